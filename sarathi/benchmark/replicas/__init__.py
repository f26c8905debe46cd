"""Data-parallel replicas of the engine: processes of this machine, or actors of a Ray cluster."""
