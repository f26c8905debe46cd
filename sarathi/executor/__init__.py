"""All ranks of an engine behind one interface."""
