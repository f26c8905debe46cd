"""An engine core in its own process, which exchanges messages over ZeroMQ. The client side does not import torch."""
