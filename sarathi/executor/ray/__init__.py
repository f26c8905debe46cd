"""Executor whose ranks are Ray actors, on any number of machines."""
