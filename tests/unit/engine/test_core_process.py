"""The core in a process of its own: its loop, its death and its parent's, over a model of a few lines."""

import asyncio
import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Awaitable, Callable, Sequence
from functools import partial
from pathlib import Path

import pytest
from fake_engine import FakeExecutor, echo, make_engine
from process_tree import is_alive

from sarathi.engine.core import EngineCore
from sarathi.engine.core_process import wire
from sarathi.engine.core_process.client import CoreProcess, CoreStartError
from sarathi.engine.core_process.connection import CoreConnection
from sarathi.engine.core_process.link import CoreDiedError
from sarathi.engine.core_process.loop import CoreLoop
from sarathi.engine.core_process.owners import MAIN
from sarathi.messages import CoreOutput, NewRequest
from sarathi.sampling_params import SamplingParams

PARAMS = SamplingParams(max_tokens=3)


def make_core() -> EngineCore:
    return make_engine(echo).core


class SlowExecutor(FakeExecutor):
    """A step takes as long as a person waits."""

    def launch(self, out):
        time.sleep(0.2)
        return super().launch(out)


def make_slow_core() -> EngineCore:
    core = make_core()
    core.executor = SlowExecutor(echo)
    return core


def fail(error: Exception) -> EngineCore:
    raise error


def die() -> EngineCore:
    os._exit(7)


def stop() -> EngineCore:
    os.kill(os.getpid(), signal.SIGSTOP)
    raise AssertionError("never continued")


def make_core_with_child(report: Path) -> EngineCore:
    """Its child is stopped: it notices nobody's end."""
    child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1000)"], start_new_session=True)
    os.kill(child.pid, signal.SIGSTOP)
    report.write_text(str(child.pid))
    return make_core()


# The loop.


class ScriptedChannel:
    """Gives one list of commands a call, then Shutdown; notes where the loop waited."""

    def __init__(self, *script: Sequence[wire.Command]) -> None:
        self.script = deque([(MAIN, command) for command in commands] for commands in script)
        self.reports: list[wire.Report] = []
        self.waits: list[float | None] = []

    def receive(self, timeout_s: float | None) -> Sequence[tuple[str, wire.Command]]:
        self.waits.append(timeout_s)
        if self.script:
            return self.script.popleft()
        return [(MAIN, wire.Shutdown())] if timeout_s is None else []

    def send(self, report: wire.Report, name: str = MAIN) -> None:
        self.reports.append(wire.decode_report(wire.encode(report)))


def add(*names: str) -> wire.AddRequests:
    return wire.AddRequests(tuple(NewRequest(name, (1, 2), PARAMS) for name in names))


def test_the_loop_waits_only_without_work_and_drains_its_inbox_between_steps() -> None:
    channel = ScriptedChannel([add("a")], [add("b"), wire.Finish(("a",), "abort")])
    CoreLoop(make_core(), channel).run()
    started, *reports = channel.reports
    assert isinstance(started, wire.Started) and started.facts.vocab_size == 257
    assert channel.waits[0] is None and channel.waits[1] == 0 and channel.waits[-1] is None
    assert channel.waits.count(None) == 2
    tokens = {"a": 0, "b": 0}
    for report in reports:
        assert isinstance(report, wire.StepOutputs)
        for update in report.updates:
            tokens[update.request_id] += len(update.tokens)
    assert tokens == {"a": 1, "b": 3}
    assert [name for report in reports for name in report.first_scheduled] == ["a", "b"]


def test_a_refused_request_is_told_and_nothing_of_it_stays() -> None:
    core = make_core()
    too_long = NewRequest("long", tuple(range(250)), PARAMS)
    channel = ScriptedChannel([wire.AddRequests((NewRequest("first", (1,), PARAMS), too_long))], [add("a")])
    CoreLoop(core, channel).run()
    refused = channel.reports[1]
    assert isinstance(refused, wire.Refused) and refused.request_ids == ("first", "long")
    assert "has 250 tokens" in refused.message and not core.has_work


def test_a_failed_step_ends_its_requests_and_the_loop_goes_on() -> None:
    core = make_core()
    core.executor.fail_next = RuntimeError("no luck")
    channel = ScriptedChannel([add("a")], [add("b")])
    CoreLoop(core, channel).run()
    assert channel.reports[1] == wire.StepFailed(("a",), "RuntimeError: no luck")
    ended = channel.reports[-1]
    assert isinstance(ended, wire.StepOutputs) and ended.updates[0].finish_reason == "length"


@pytest.mark.parametrize("lost", ["steps", "device"])
def test_the_loop_ends_where_no_step_can_succeed(lost: str) -> None:
    core = make_core()

    def broken(*_: object) -> None:
        raise RuntimeError("CUDA error")

    core.executor.launch = broken
    if lost == "device":
        core.executor.wait = broken
    channel = ScriptedChannel(*([add(name)] for name in "abcdef"))
    with pytest.raises(RuntimeError, match="CUDA error"):
        CoreLoop(core, channel).run()
    assert len(channel.reports) == 1 + (3 if lost == "steps" else 1)


def test_stats_are_those_between_two_steps() -> None:
    channel = ScriptedChannel([add("a"), wire.GetStats()])
    CoreLoop(make_core(), channel).run()
    stats = channel.reports[1]
    assert isinstance(stats, wire.Stats) and (stats.core.num_running, stats.core.num_waiting) == (0, 1)
    assert (stats.core.used_rows, stats.core.total_rows) == (0, 1000)


# The process.


class Listener:
    """Keeps what it hears."""

    def __init__(self) -> None:
        self.outputs: asyncio.Queue[CoreOutput] = asyncio.Queue()
        self.refused: list[str] = []
        self.death = asyncio.Event()
        self.on_outputs = self.outputs.put_nowait

    def on_refused(self, request_ids: Sequence[str], message: str) -> None:
        self.refused += request_ids

    def on_step_failed(self, request_ids: Sequence[str], message: str) -> None:
        raise AssertionError(message)

    def on_death(self, error: CoreDiedError) -> None:
        assert not self.death.is_set()
        self.death.set()


def with_core(
    use: Callable[[CoreProcess, Listener], Awaitable[None]],
    make: Callable[[], EngineCore] = make_core,
    started: Callable[[], None] = lambda: None,
    **options: object,
) -> None:
    async def run() -> None:
        core = await CoreProcess.start(make, **options)
        started()
        listener = Listener()
        core.listen(listener)
        try:
            await use(core, listener)
        finally:
            await core.close()
            assert not core.folder.exists()
            assert core._process.returncode is not None

    asyncio.run(asyncio.wait_for(run(), 60))


async def tokens_of(listener: Listener, name: str) -> list[int]:
    tokens: list[int] = []
    while True:
        for update in (await listener.outputs.get()).updates:
            if update.request_id == name:
                tokens += [token.token_id for token in update.tokens]
                if update.finish_reason is not None:
                    return tokens


def test_tokens_come_back_and_the_process_ends_in_order() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        core.add_requests([NewRequest("a", (5, 6, 7), PARAMS)])
        tokens = [5, 6, 7]
        for _ in range(3):
            tokens.append(echo(tokens, PARAMS))
        assert await tokens_of(listener, "a") == tokens[3:]
        assert (await core.stats()).num_running == 0
        await core.close()
        assert core._process.returncode == 0 and not listener.death.is_set()

    with_core(use)


def test_parameters_that_no_process_can_get_are_refused() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        params = SamplingParams(logits_processors=[lambda tokens, logits: logits])
        with pytest.raises(ValueError, match="cannot be serialized for the core process"):
            core.add_requests([NewRequest("a", (1,), params)])

    with_core(use)


def test_the_folder_of_the_sockets_is_private() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        assert core.folder.stat().st_mode & 0o777 == 0o700

    with_core(use)


def test_an_idle_core_takes_no_processor_time() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        stat = Path(f"/proc/{core._process.pid}/stat")

        def ticks() -> int:
            return sum(map(int, stat.read_text().rpartition(")")[2].split()[11:13]))

        spent = [ticks()]
        while len(spent) < 2 or (spent[-1] - spent[-2] > 3 and len(spent) < 20):  # at first it may still be starting
            await asyncio.sleep(1.0)
            spent.append(ticks())
        assert spent[-1] - spent[-2] <= 3, spent  # hundredths of a second

    with_core(use)


def test_a_killed_core_is_told_at_once() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        stats = asyncio.create_task(core.stats())
        await asyncio.sleep(0)
        os.kill(core._process.pid, signal.SIGKILL)
        await asyncio.wait_for(listener.death.wait(), 60)
        with pytest.raises(CoreDiedError, match="exit code -9"):
            await core.stats()
        await asyncio.wait([stats])
        core.add_requests([NewRequest("late", (1,), PARAMS)])  # harmless
        stats.exception()

    with_core(use, make_slow_core)


def test_a_stopped_core_is_told_after_the_timeout_and_killed() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        os.kill(core._process.pid, signal.SIGSTOP)
        await asyncio.wait_for(listener.death.wait(), 60)
        assert "no heartbeat" in str(core.error)
        assert await asyncio.wait_for(core._process.wait(), 60) == -9

    with_core(use, heartbeat_timeout_s=1.5)


def test_children_of_a_stopped_core_end_with_it(tmp_path: Path) -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        child = int((tmp_path / "child").read_text())
        assert is_alive(child)
        os.kill(core._process.pid, signal.SIGSTOP)
        await asyncio.wait_for(listener.death.wait(), 60)
        deadline_s = time.monotonic() + 60
        while is_alive(child):
            assert time.monotonic() < deadline_s
            await asyncio.sleep(0.02)

    with_core(use, partial(make_core_with_child, tmp_path / "child"), heartbeat_timeout_s=1.5)


def test_stats_fail_where_the_core_is_asked_to_end() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        os.kill(core._process.pid, signal.SIGSTOP)
        asked = asyncio.create_task(core.stats())
        await asyncio.sleep(0.1)
        closing = asyncio.create_task(core.close())
        with pytest.raises(CoreDiedError, match="link to the core process is closed"):
            await asyncio.wait_for(asked, 60)
        os.kill(core._process.pid, signal.SIGCONT)
        await closing
        with pytest.raises(CoreDiedError, match="link to the core process is closed"):
            await asyncio.wait_for(core.stats(), 60)

    with_core(use)


def test_a_report_that_cannot_be_processed_ends_the_core_and_is_told() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        def broken(output: CoreOutput) -> None:
            raise KeyError("no such request")

        listener.on_outputs = broken
        core.add_requests([NewRequest("a", (1,), PARAMS)])
        await asyncio.wait_for(listener.death.wait(), 60)
        assert "could not be processed: KeyError" in str(core.error)

    with_core(use)


def test_a_core_that_hangs_while_it_starts_is_given_up(monkeypatch: pytest.MonkeyPatch, sockets: Path) -> None:
    monkeypatch.setattr("sarathi.engine.core_process.client._START_TIMEOUT_S", 1.5)
    with pytest.raises(CoreStartError, match=r"no heartbeat for 1\.5 s during its start"):
        with_core(None, stop)
    assert not list(sockets.iterdir())


def test_a_start_that_is_cancelled_leaves_no_process() -> None:
    async def run() -> None:
        processes = []
        start = asyncio.create_task(CoreProcess.start(partial(time.sleep, 60)))
        spawn = asyncio.create_subprocess_exec

        async def noted(*words: str, **options: object) -> object:
            processes.append(await spawn(*words, **options))
            return processes[-1]

        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(asyncio, "create_subprocess_exec", noted)
            while not processes:
                await asyncio.sleep(0.01)
            await asyncio.sleep(0.5)  # it waits for the core
            start.cancel()
            with pytest.raises(asyncio.CancelledError):
                await start
        assert processes[0].returncode == -signal.SIGKILL

    asyncio.run(asyncio.wait_for(run(), 120))


def test_a_step_longer_than_the_timeout_is_no_death() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        core.add_requests([NewRequest("a", (1,), SamplingParams(max_tokens=10))])
        assert len(await tokens_of(listener, "a")) == 10
        assert core.error is None

    with_core(use, make_slow_core, heartbeat_timeout_s=1.1)


def test_signals_of_a_service_manager_leave_the_core_to_its_parent() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        os.kill(core._process.pid, signal.SIGTERM)
        os.kill(core._process.pid, signal.SIGINT)
        core.add_requests([NewRequest("a", (1,), PARAMS)])
        assert len(await tokens_of(listener, "a")) == 3

    with_core(use)


@pytest.mark.parametrize(
    ("make", "kind", "message"),
    [
        (partial(fail, ValueError("max_num_seqs is -1")), ValueError, "^max_num_seqs is -1$"),
        (partial(fail, RuntimeError("out of memory")), CoreStartError, "^RuntimeError: out of memory$"),
        (die, CoreStartError, "exit code 7 during its start"),
    ],
)
def test_a_core_that_cannot_start_says_why_and_leaves_nothing(make, kind, message: str, sockets: Path) -> None:
    with pytest.raises(kind, match=message):
        with_core(None, make)
    assert not list(sockets.iterdir())


def test_no_core_outlives_its_parent_not_even_one_that_is_stopped(tmp_path: Path) -> None:
    script = tmp_path / "parent.py"
    script.write_text(
        "import asyncio, os, signal\n"
        "from test_core_process import make_core\n"
        "from sarathi.engine.core_process.client import CoreProcess\n"
        "async def run():\n"
        "    core = await CoreProcess.start(make_core)\n"
        "    print(core._process.pid, core.folder, flush=True)\n"
        "    os.kill(core._process.pid, signal.SIGSTOP)\n"
        "    os.kill(os.getpid(), signal.SIGKILL)\n"
        "asyncio.run(run())\n"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    done = subprocess.run([sys.executable, script], env=env, capture_output=True, text=True, timeout=60)
    pid, folder = done.stdout.split()
    deadline_s = time.monotonic() + 60
    while is_alive(int(pid)) or Path(folder).exists():
        assert time.monotonic() < deadline_s
        time.sleep(0.05)


def test_ranks_are_checked_while_there_is_no_work() -> None:
    core, channel = make_core(), ScriptedChannel([add("a")])
    looks = iter((None, None, RuntimeError("rank 1 of 2 hangs")))

    def look() -> None:
        if (error := next(looks)) is not None:
            raise error

    core.executor.health_check_interval_s, core.executor.check_health = 0.25, look
    with pytest.raises(RuntimeError, match="rank 1 of 2 hangs"):
        CoreLoop(core, channel).run()
    assert channel.waits == [0.25, 0.0, 0.0, 0.0, 0.25, 0.25, 0.25]  # three steps


# Several front ends.


class NamedChannel(ScriptedChannel):
    """With the names of senders and receivers."""

    def __init__(self, *script: Sequence[tuple[str, wire.Command]]) -> None:
        super().__init__()
        self.script = deque(script)
        self.told: list[tuple[str, wire.Report]] = []

    def send(self, report: wire.Report, name: str = MAIN) -> None:
        super().send(report, name)
        self.told.append((name, self.reports[-1]))


def test_each_front_end_is_told_of_its_own_requests() -> None:
    core = make_core()
    too_long = NewRequest("long", tuple(range(250)), PARAMS)
    channel = NamedChannel(
        [("x", wire.Join()), ("x", add("a", "b")), ("y", add("c")), ("y", wire.AddRequests((too_long,)))],
        [("x", wire.Finish(("b",), "abort")), ("y", wire.GetStats())],
    )
    CoreLoop(core, channel).run()
    kinds = {(name, type(report)) for name, report in channel.told}
    assert ("x", wire.Started) in kinds and ("y", wire.Refused) in kinds and ("y", wire.Stats) in kinds
    assert ("x", wire.Refused) not in kinds and ("x", wire.Stats) not in kinds
    outputs = [(name, report) for name, report in channel.told if isinstance(report, wire.StepOutputs)]
    ends = {(name, each.request_id) for name, report in outputs for each in report.updates if each.finish_reason}
    assert ends == {("x", "a"), ("y", "c")} and {name for name, _ in outputs} == {"x", "y"}
    assert sorted((name, each) for name, report in outputs for each in report.first_scheduled) == [
        ("x", "a"), ("x", "b"), ("y", "c"),
    ]  # fmt: skip


def test_requests_of_a_front_end_that_is_gone_end_and_later_ones_are_not_begun() -> None:
    core = make_core()
    channel = NamedChannel(
        [("x", add("a")), ("y", add("b"))], [(MAIN, wire.Leave("x")), ("x", add("late")), ("z", add("d"))]
    )
    CoreLoop(core, channel).run()
    tokens = {"a": 0, "b": 0, "d": 0}
    for _, report in channel.told:
        for each in getattr(report, "updates", ()):
            tokens[each.request_id] += len(each.tokens)
    assert tokens == {"a": 1, "b": 3, "d": 3} and not core.has_work


def test_a_failed_step_is_told_to_everyone_in_it() -> None:
    core = make_core()
    core.executor.fail_next = RuntimeError("no luck")
    channel = NamedChannel([("x", add("a")), (MAIN, add("b"))], [("x", add("c"))])
    CoreLoop(core, channel).run()
    failed = {name: report.request_ids for name, report in channel.told if isinstance(report, wire.StepFailed)}
    assert failed == {"x": ("a",), MAIN: ("b",)}


def test_front_ends_share_a_core_and_notice_its_death() -> None:
    async def use(core: CoreProcess, listener: Listener) -> None:
        listeners = {name: Listener() for name in ("x", "y")}
        links = [await CoreConnection.join(core.folder, name, os.dup(life)) for name in listeners]
        for link in links:
            assert link.facts == core.facts
            link.listen(listeners[link.name])
            link.add_requests([NewRequest(link.name + "1", (5, 6, 7), PARAMS)])
        tokens = [await tokens_of(listeners[name], name + "1") for name in listeners]
        assert tokens[0] == tokens[1] and len(tokens[0]) == 3 and listener.outputs.empty()
        assert (await links[0].stats()).num_running == 0
        await links[0].close()
        core.kill()
        await asyncio.wait_for(listeners["y"].death.wait(), 60)
        with pytest.raises(CoreDiedError, match="ended"):
            await links[1].stats()
        assert not listeners["x"].death.is_set()

    life, held = os.pipe()
    try:
        with_core(use, pass_fds=[held], started=lambda: os.close(held))
    finally:
        os.close(life)
