"""The server as a process: connections, signals, and its end."""
