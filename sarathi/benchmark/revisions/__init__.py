"""Two checkouts of the engine measured against each other: worker.py runs in each, compare.py drives both."""
