"""Engines under the same load: this one and vLLM behind one interface."""
