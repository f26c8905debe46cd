"""`sarathi chat`: a conversation on a terminal, with a model in this process or on a server."""

from sarathi.entrypoints.chat.command import run

__all__ = ["run"]
