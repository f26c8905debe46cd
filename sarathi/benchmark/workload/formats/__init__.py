"""Readers of traces and data sets, a file a format. They know nothing of what is made of the requests."""
