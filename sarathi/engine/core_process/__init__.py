"""An engine core in a process of its own, behind messages over ZeroMQ. The client's side needs no torch."""
