"""Random numbers of tests: every test begins with generators seeded by one new number, which is shown where it fails.

    pytest tests/unit/core --seeds 200          run each test that draws random numbers 200 times, from 200 seeds
    pytest tests/unit/core -k name --seed 17    run with the seed that a failure has shown

A module that needs the number itself has a variable SEED, which is set anew for each of its tests.
"""

import gc
import random
import sys
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

import pytest

_STATES = pytest.StashKey[list[object]]()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--seed", type=int, metavar="S", help="seed of every test; default: a new one for each")
    parser.addoption("--seeds", type=int, default=1, metavar="N", help="runs of each test that draws random numbers")


def pytest_configure(config: pytest.Config) -> None:
    if config.getoption("seeds") > 1:
        config.pluginmanager.register(Repetitions(config.getoption("seeds")))


@pytest.hookimpl(trylast=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        items[:] = in_shares(items, config.workerinput["workercount"])


def pytest_collection_finish() -> None:
    gc.collect()
    gc.freeze()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if uniproc := sys.modules.get("sarathi.executor.uniproc"):
        uniproc._FROZEN = FROZEN_IMPORTS
    given = item.config.getoption("seed")
    seed = random.SystemRandom().randrange(2**31) if given is None else given
    item.add_report_section("setup", "seed", f"--seed {seed}")
    random.seed(seed)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(seed)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(seed)
    if has_seed(item):
        item.module.SEED = seed
    item.stash[_STATES] = generator_states()


class FrozenImports:
    """In place of the heap that engines in this process freeze: what tests import stays frozen.

    A new engine collects what came after that. A collection of everything takes half a second, and tests make hundreds
    of engines.
    """

    def enter(self) -> None:
        gc.collect()

    def leave(self) -> None:
        """What is frozen stays so."""


FROZEN_IMPORTS = FrozenImports()


@pytest.fixture
def repetition(request: pytest.FixtureRequest) -> int:
    """The number of a test's run, with --seeds."""
    return request.param


class Repetitions:
    """Runs all tests once, and then those again and again that drew random numbers. Not for several processes."""

    def __init__(self, count: int) -> None:
        self._count = count
        self._without: set[str] = set()  # tests that drew none
        self._runs: Counter[str] = Counter()

    def pytest_generate_tests(self, metafunc: pytest.Metafunc) -> None:
        metafunc.fixturenames.append("repetition")
        names = [f"run{number}" for number in range(self._count)]
        metafunc.parametrize("repetition", range(self._count), indirect=True, ids=names)

    @pytest.hookimpl(tryfirst=True)
    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items.sort(key=repetition_of)

    @pytest.hookimpl(hookwrapper=True)
    def pytest_runtest_protocol(self, item: pytest.Item) -> Iterator[None]:
        name = item.nodeid.replace(f"run{repetition_of(item)}", "")
        if name in self._without:
            item.add_marker(pytest.mark.skip(reason="it draws no random numbers"))
        yield
        self._runs[name] += name not in self._without
        if not has_seed(item) and generator_states() == item.stash.get(_STATES, None):
            self._without.add(name)

    def pytest_terminal_summary(self, terminalreporter: pytest.TerminalReporter) -> None:
        runs = [count for name, count in self._runs.items() if name not in self._without]
        if runs:
            terminalreporter.write_line(f"{len(runs)} tests drew random numbers: {min(runs)} to {max(runs)} runs each")


def in_shares(items: list[pytest.Item], num_processes: int) -> list[pytest.Item]:
    """The order for processes that begin with equal shares of the list, and then take from the end of each other's.

    Each share begins with long tests: the first with those of the shared server, the second with the other integration
    tests, of which those of the reference model come one after the other. Short tests are left for the end.
    """
    with_server = files_with("server", items)
    first = [item for item in items if item.path in with_server]
    others = [item for item in items if item.path not in with_server]
    second = [item for item in others if item.path.parent.name == "integration"]
    with_reference = files_with("reference", items)
    second.sort(key=lambda item: item.path not in with_reference)
    short = [item for item in others if item.path.parent.name != "integration"]
    cut = max(0, len(items) // num_processes - len(first))
    return [*first, *short[:cut], *second, *short[cut:]]


def files_with(fixture: str, items: list[pytest.Item]) -> set[Path]:
    return {item.path for item in items if fixture in getattr(item, "fixturenames", ())}


def repetition_of(item: pytest.Item) -> int:
    return item.callspec.params["repetition"] if hasattr(item, "callspec") else 0


def has_seed(item: pytest.Item) -> bool:
    return hasattr(getattr(item, "module", None), "SEED")


def generator_states() -> list[object]:
    """Of Python's generator, and of numpy's and torch's where those are loaded."""
    states: list[object] = [random.getstate()]
    if torch := sys.modules.get("torch"):
        states.append(torch.get_rng_state().tolist())
    if numpy := sys.modules.get("numpy"):
        states.append(str(numpy.random.get_state()))
    return states
