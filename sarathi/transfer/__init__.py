"""Transfers keys and values of prompts from the prefill engine's cache to the decode engine's, as memory ranges.

`Portions` decides which tokens each step sends. A `Sender` on each rank sends them layer by layer to the `Receiver` on
the same rank of the decode engine.
"""
