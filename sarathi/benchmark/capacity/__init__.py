"""Search for the highest request rate that meets latency targets."""
