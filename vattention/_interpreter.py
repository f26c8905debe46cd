"""Raises ImportError in a sub-interpreter, where loading the native module or torch hangs or crashes."""

try:
    import _interpreters as interpreters
except ImportError:  # before Python 3.13
    import _xxsubinterpreters as interpreters

if interpreters.get_current() != interpreters.get_main():
    raise ImportError("vattention works in the main interpreter only, and this is a sub-interpreter")
