"""This engine and vLLM behind one interface, for measurements under the same load."""
