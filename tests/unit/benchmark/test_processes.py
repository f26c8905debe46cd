"""How processes end: by signals, with their parent, and one at a time for a folder."""

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from sarathi.benchmark.run.processes import (
    ENDING,
    ended_by_signals,
    held_signals,
    locked,
    stopped_by_signals,
)

PARENT = """
import os, subprocess, sys, time
from functools import partial
from sarathi.parent_death import end_with_parent
child = subprocess.Popen(["sleep", "60"], preexec_fn=partial(end_with_parent, os.getpid()))
print(child.pid, flush=True)
time.sleep(60)
"""
HOLDER = """
import sys, time
from pathlib import Path
from sarathi.benchmark.run.processes import locked
with locked([Path(sys.argv[1])]):
    print("held", flush=True)
    time.sleep(60)
"""


def started(source: str, *words: object) -> tuple[subprocess.Popen[str], str]:
    """A process and the first line that it prints."""
    process = subprocess.Popen([sys.executable, "-c", source, *map(str, words)], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    return process, process.stdout.readline()


@pytest.mark.parametrize("number", ENDING)
def test_a_signal_ends_once_and_its_handler_is_put_back(number: signal.Signals) -> None:
    before = signal.signal(number, signal.SIG_DFL)  # under nohup SIGHUP is ignored
    try:
        with pytest.raises(KeyboardInterrupt, match=number.name), ended_by_signals():
            try:
                os.kill(os.getpid(), number)
                time.sleep(1)
            finally:
                os.kill(os.getpid(), number)  # while files are written: ignored
        assert signal.getsignal(number) == signal.SIG_DFL
    finally:
        signal.signal(number, before)


def test_a_signal_that_was_ignored_stays_ignored() -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)  # as nohup does
    try:
        with ended_by_signals():
            os.kill(os.getpid(), signal.SIGHUP)
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_interrupt_ends_measuring_but_not_writing() -> None:
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a job in the background has it ignored
    stop = threading.Event()
    try:
        with pytest.raises(KeyboardInterrupt), stopped_by_signals(stop):
            signal.raise_signal(signal.SIGINT)
            with held_signals(stop):
                signal.raise_signal(signal.SIGINT)
            assert stop.is_set()
            signal.raise_signal(signal.SIGINT)
        assert signal.getsignal(signal.SIGINT) == signal.default_int_handler
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.mark.parametrize("held", [held_signals, stopped_by_signals])
def test_a_signal_that_comes_while_another_is_noted_is_noted_too(held: Callable[..., Any]) -> None:
    class Interrupted(threading.Event):
        """SIGTERM comes while `set` has begun, which holds a lock."""

        has_begun = False

        def set(self) -> None:
            assert not self.has_begun
            self.has_begun = True
            signal.raise_signal(signal.SIGTERM)
            super().set()

    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    stop = Interrupted()
    try:
        with held(stop):
            signal.raise_signal(signal.SIGINT)
        assert stop.is_set()
    finally:
        signal.signal(signal.SIGINT, before)


def test_a_child_ends_with_a_parent_that_is_killed() -> None:
    parent, line = started(PARENT)
    stat = Path(f"/proc/{int(line)}/stat")
    assert stat.exists()
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 60
    while stat.exists() and stat.read_text().rpartition(")")[2].split()[0] != "Z":
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_folder_has_one_writer_and_none_once_that_is_killed(tmp_path: Path) -> None:
    folder = tmp_path / "out"
    holder, line = started(HOLDER, folder)
    assert line == "held\n"
    with locked([tmp_path / "other"]):
        pass
    with pytest.raises(ValueError, match=f"{folder} is in use"), locked([tmp_path / "other", folder]):
        pass
    holder.kill()
    holder.wait()
    with locked([folder]):
        pass
