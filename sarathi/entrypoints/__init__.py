"""The Python class `LLM`, and above it the command line. The engine imports nothing from here."""
