"""Moving a request's keys and values to another engine's cache: prefill on one device, decode on another."""
