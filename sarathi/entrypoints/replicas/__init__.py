"""Several engines behind one address, as replicas of a Ray Serve deployment. Needs the `ray` extra."""
