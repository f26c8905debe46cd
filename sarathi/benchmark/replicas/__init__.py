"""Several engines that share the requests of a run: as processes of this machine, or as actors of a Ray cluster."""
