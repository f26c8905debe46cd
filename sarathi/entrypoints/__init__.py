"""Ways in: the Python class, the command line. Nothing below imports from here."""
