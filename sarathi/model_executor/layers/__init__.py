"""The parts of a decoder: objects that own weights and call the operations they were built with."""
