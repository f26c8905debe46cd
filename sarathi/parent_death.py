"""What the kernel does to a process when its parent ends, so that none is left: also to one that is stopped.

The parent is the thread that started the process: where that ends alone, another one of its process takes its place.
"""

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1  # prctl(2)


def end_with_parent(parent: int) -> None:
    """In a child: the kernel kills this process when the thread that started it ends. parent: its process id."""
    _signal_on_parent_death(signal.SIGKILL)
    if os.getppid() != parent:
        os.kill(os.getpid(), signal.SIGKILL)


def continue_without_parent() -> None:
    """In a child that ends by itself when its parent has ended: the kernel then continues it where it is stopped.

    In contrast to `end_with_parent`, the child outlives the thread that started it, and can clean up behind itself.
    """
    _signal_on_parent_death(signal.SIGCONT)


def _signal_on_parent_death(number: signal.Signals) -> None:
    if ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, number) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
