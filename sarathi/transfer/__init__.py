"""Prefill on one engine, decode on another: a prompt's keys and values are sent to the other's cache by ranges.

`Portions` decides what leaves in which step, a `Sender` on each rank sends it layer by layer, a `Receiver` on the same
rank of the other engine takes it in.
"""
