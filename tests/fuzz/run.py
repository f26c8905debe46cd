"""Fuzzes the readers of user files: each must return or raise ValueError within seconds.

    python tests/fuzz/run.py --seconds 60               all readers, in turn; a failure's input is kept in the output
    python tests/fuzz/run.py --seconds 1800 --seed 7 --reader gguf

Exit code 1 if a reader raised something else, took too long, or crashed the process. Each reader runs in a process
of its own, with bounded memory, so that a crash or a loop in native code ends that process alone.
"""

import argparse
import collections
import json
import multiprocessing
import os
import random
import resource
import signal
import sys
import time
import traceback
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
from mutations import broken_bytes, broken_json, broken_lines
from readers import READERS, json_of, read_bytes, seeds_of

CASE_S = 20  # of processor time, whatever else the machine does: a reader that takes longer hangs
MEMORY_BYTES = 16 << 30  # of addresses


class TooSlow(BaseException):
    """Raised by the alarm, past every `except Exception` of a reader."""


def main(words: list[str] | None = None) -> int:
    """Returns the exit code: 0 if nothing was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="of all readers together")
    parser.add_argument("--jobs", type=int, default=1, help="readers at a time, which share the seconds")
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--reader", choices=READERS, action="append", help="one reader; repeatable; none: all")
    parser.add_argument("--output", type=Path, default=Path("results/fuzz"), help="folder of inputs that failed")
    args = parser.parse_args(words)
    seed = random.randrange(10**9) if args.seed is None else args.seed
    print(f"seed {seed}", flush=True)
    names = args.reader or list(READERS)
    with ThreadPoolExecutor(args.jobs) as pool:
        run = partial(_run_apart, seconds=args.seconds / len(names), seed=seed, output=args.output)
        failures = sum(pool.map(run, names))
    return 1 if failures else 0


def _run_apart(name: str, seconds: float, seed: int, output: Path) -> int:
    """The number of failures of one reader, counting the death of its process."""
    output.mkdir(parents=True, exist_ok=True)
    current, report = output / f"{name}-current.bin", output / f"{name}.json"
    report.unlink(missing_ok=True)
    process = multiprocessing.get_context("spawn").Process(target=fuzz, args=(name, seconds, seed, output))
    process.start()
    process.join(seconds + 6 * CASE_S + 120)
    if process.is_alive():
        process.kill()
        process.join()
    if process.exitcode == 0 and report.exists():
        found = json.loads(report.read_text())
        print(f"{name:10} {found['cases']:7} cases, {found['outcomes']}", flush=True)
        current.unlink(missing_ok=True)
        return len(found["failures"])
    print(f"{name:10} died with exit code {process.exitcode} reading {current}", flush=True)
    return 1


def fuzz(name: str, seconds: float, seed: int, output: Path) -> None:
    """Reads every seed unchanged, then mutated ones until the time is up."""
    with open(output / f"{name}.log", "w") as log:  # what libraries say of broken files, panics in Rust among it
        os.dup2(log.fileno(), 2)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    signal.signal(signal.SIGPROF, _on_alarm)
    rng, seeds, end_s = random.Random(f"{name} {seed}"), seeds_of(name), time.monotonic() + seconds
    outcomes: collections.Counter[str] = collections.Counter()
    failures: dict[str, str] = {}
    waiting = [(path, path.read_bytes()) for path in seeds]
    while waiting or time.monotonic() < end_s:
        path, content = waiting.pop() if waiting else _broken(rng.choice(seeds), READERS[name].is_text, rng)
        (output / f"{name}-current.bin").write_bytes(content)
        outcome, trace = _read(name, content, path)
        outcomes[outcome] += 1
        if trace and _frames(trace) not in map(_frames, failures.values()):
            file = output / f"found-{name}-{len(failures)}@{path.name.split('@')[-1]}"
            file.write_bytes(content)
            failures[file.name] = trace
            print(f"{name}: {outcome}: {file}\n{trace}", flush=True)
        if len(failures) >= 10:
            break
    found: dict[str, Any] = {"cases": sum(outcomes.values()), "outcomes": dict(outcomes), "failures": failures}
    (output / f"{name}.json").write_text(json.dumps(found))


def _broken(path: Path, is_text: bool, rng: random.Random) -> tuple[Path, bytes]:
    content = path.read_bytes()
    document = json_of(content) if is_text else None
    if document is not None and rng.random() < 0.7:
        return path, broken_json(document, rng)
    return path, (broken_lines if is_text and rng.random() < 0.6 else broken_bytes)(content, rng)


def _read(name: str, content: bytes, path: Path) -> tuple[str, str]:
    """The outcome, and the traceback of an error that is not a ValueError."""
    signal.setitimer(signal.ITIMER_PROF, CASE_S)
    try:
        read_bytes(name, content, path)
        return "read", ""
    except ValueError:
        return "refused", ""
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        frames = traceback.extract_tb(error.__traceback__)[-6:]
        where = "\n".join(f"  {frame.filename}:{frame.lineno} {frame.name}" for frame in frames)
        return type(error).__name__, f"{type(error).__name__}: {str(error)[:300]}\n{where}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)


def _frames(trace: str) -> str:
    return trace[trace.rindex("\n  ") :] if "\n  " in trace else trace


def _on_alarm(_signal: int, _frame: Any) -> None:
    raise TooSlow(f"a file that takes more than {CASE_S} s")


if __name__ == "__main__":
    sys.exit(main())
