"""Who may use an engine: one thread at a time, and only threads of the process that made it."""

import os
import threading


class EngineLock:
    """A lock that goes to waiting threads before the thread that had it last gets it again."""

    def __init__(self) -> None:
        self._lock = threading.RLock()  # for its owner's identity: nobody acquires it twice
        self._next = threading.Lock()  # held by the thread that gets the lock next; the others wait for this one
        self._process_id = os.getpid()

    def check(self) -> None:
        """Raise RuntimeError where acquire() could never return: in a forked process, and inside a use by this thread.

        A forked process has none of the engine's threads, and its parent owns the memory and the GPU context.
        """
        if os.getpid() != self._process_id:
            raise RuntimeError(
                f"this LLM belongs to process {self._process_id}, and process {os.getpid()} was forked from it: create "
                "an LLM in each process, or start processes with multiprocessing's 'spawn' method"
            )
        self.check_reentry()

    def check_reentry(self) -> None:
        """The second half of check()."""
        if os.getpid() == self._process_id and self._is_mine:
            raise RuntimeError("this LLM is in the middle of a step of the same thread: it cannot be used from there")

    def acquire(self) -> None:
        with self._next:
            self._lock.acquire()

    def acquire_if_free(self) -> bool:
        """Without waiting; False too where check() would raise."""
        return os.getpid() == self._process_id and not self._is_mine and self._lock.acquire(blocking=False)

    def release(self) -> None:
        """Nothing happens where this thread does not have it, as after Ctrl-C in acquire()."""
        if self._is_mine:
            self._lock.release()

    @property
    def _is_mine(self) -> bool:
        return self._lock._is_owned()  # type: ignore[attr-defined,no-any-return]
