"""Ranks outside this process: what the executor and a rank say to each other, and how both hold to it."""
