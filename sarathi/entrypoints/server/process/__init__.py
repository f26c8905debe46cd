"""The server process: connections, signals and shutdown."""
