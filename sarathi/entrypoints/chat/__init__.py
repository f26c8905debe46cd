"""`sarathi chat`: a conversation on a terminal, with a model of this process or of a server."""

from sarathi.entrypoints.chat.command import run

__all__ = ["run"]
