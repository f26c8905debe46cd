"""Several API processes over one engine: a supervisor and its worker processes."""
