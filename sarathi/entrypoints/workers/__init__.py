"""Several API processes over one engine: a supervisor, and the processes that it keeps running."""
