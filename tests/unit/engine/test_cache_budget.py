"""Who of a group holds how much, as arithmetic; members as processes that are killed."""

import itertools
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from fake_engine import MAX_MODEL_LEN, FakeExecutor, echo

from sarathi.config.knobs import ConfigError
from sarathi.config.load import make_config
from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import Scheduler, make_scheduler
from sarathi.engine.build import build_core
from sarathi.engine.cache_budget.division import Claim, Holding, allowance, divide
from sarathi.engine.cache_budget.group import BudgetGroup
from sarathi.engine.cache_budget.shared import SharedCacheBudget
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.messages import CacheCapacity, NewRequest
from sarathi.sampling_params import SamplingParams

SEED = 0
TOTAL = 1000


@pytest.mark.parametrize(
    ("wishes", "expected"),
    [
        ([1000], [1000]),
        ([2000], [1000]),
        ([30, 1000], [30, 970]),
        ([1000, 1000], [500, 500]),
        ([100, 400, 900], [100, 400, 500]),
        ([100, 800, 900], [100, 450, 450]),
        ([0, 0], [0, 0]),
    ],
)
def test_the_smallest_shares_are_the_largest_that_fit(wishes: list[int], expected: list[int]) -> None:
    assert divide(TOTAL, [Claim(wish) for wish in wishes]) == expected


def test_the_oldest_requests_need_goes_first() -> None:
    young, old = Claim(1000, need=600, since_s=2.0), Claim(1000, need=700, since_s=1.0)
    assert divide(TOTAL, [young, old]) == [300, 700]
    assert divide(TOTAL, [young, old._replace(need=100)]) == [600, 400]


def test_shares_of_random_claims_are_fair_and_within_the_total() -> None:
    rng = random.Random(SEED)
    for _ in range(300):
        claims = [
            Claim(wish := rng.randrange(1500), rng.randrange(wish + 1) // rng.choice([1, 9]), rng.random())
            for _ in range(rng.randint(1, 5))
        ]
        shares = divide(TOTAL, claims)
        pairs = list(zip(shares, claims, strict=True))
        assert sum(shares) <= TOTAL and all(0 <= share <= claim.wish for share, claim in pairs)
        wanting = [share for share, claim in pairs if share < claim.wish]
        assert not wanting or sum(shares) > TOTAL - len(claims)  # what one lacks no other leaves unused
        for share, claim in pairs:
            if share > claim.need and wanting:
                assert share <= min(wanting) + 1  # nobody has more than one who lacks, but for a need


def test_members_that_ask_in_turn_never_hold_more_than_the_total() -> None:
    rng = random.Random(SEED)
    for _ in range(50):
        members = [Holding(Claim(), 0) for _ in range(rng.randint(1, 4))]
        for _ in range(100):
            at = rng.randrange(len(members))
            wish = rng.choice([0, 10, 300, 1000])
            claim = Claim(wish, wish // 9, rng.random())
            own = members.pop(at)
            allowed = allowance(TOTAL, Holding(claim, own.held), members)
            held = max(allowed, own.held) if rng.random() < 0.3 else allowed  # memory that is still in use
            members.insert(at, Holding(claim, held))
            assert sum(each.held for each in members) <= TOTAL
        for _ in range(8):
            for at, own in enumerate(members):
                others = [*members[:at], *members[at + 1 :]]
                members[at] = own._replace(held=allowance(TOTAL, own, others))
        shares = divide(TOTAL, [each.claim for each in members])
        assert all(each.held >= share for each, share in zip(members, shares, strict=True))


def test_idle_memory_goes_where_it_is_wished_for_and_comes_back(tmp_path: Path) -> None:
    one, other = BudgetGroup(tmp_path, TOTAL), BudgetGroup(tmp_path, TOTAL)
    assert one.exchange(Claim(TOTAL), 0) == TOTAL
    assert other.exchange(Claim(TOTAL), 0) == 0
    assert one.exchange(Claim(TOTAL), TOTAL) == TOTAL // 2  # as soon as it can
    assert other.exchange(Claim(TOTAL), 0) == 0  # it has not been given back yet
    assert one.exchange(Claim(TOTAL), TOTAL // 2) == TOTAL // 2
    assert other.exchange(Claim(TOTAL), 0) == TOTAL // 2
    one.leave()
    assert other.exchange(Claim(TOTAL), TOTAL // 2) == TOTAL
    other.leave()
    assert not list(tmp_path.glob("member-*"))


def test_a_member_with_another_total_is_refused(tmp_path: Path) -> None:
    group = BudgetGroup(tmp_path, TOTAL)
    with pytest.raises(ValueError, match="memory_bytes is 999: the other members of this kv_budget_group share 1000"):
        BudgetGroup(tmp_path, 999)
    group.leave()
    BudgetGroup(tmp_path, 999).leave()


def test_the_share_of_a_killed_member_is_free(tmp_path: Path) -> None:
    program = (
        "import sys, time; from pathlib import Path; from sarathi.engine.cache_budget.group import BudgetGroup, Claim\n"
        f"group = BudgetGroup(Path(sys.argv[1]), {TOTAL}); print(group.exchange(Claim({TOTAL}), 0), flush=True)\n"
        "time.sleep(600)"
    )
    with subprocess.Popen([sys.executable, "-c", program, tmp_path], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None and process.stdout.readline() == f"{TOTAL}\n"
        group = BudgetGroup(tmp_path, TOTAL)
        assert group.exchange(Claim(TOTAL), 0) == 0
        process.kill()
    assert group.exchange(Claim(TOTAL), 0) == TOTAL
    group.leave()


class ElasticExecutor(FakeExecutor):
    """Gives memory back only when no request holds it."""

    def __init__(self, scheduler: Scheduler) -> None:
        super().__init__(echo, scheduler.block_space_manager.capacity)
        self._scheduler = scheduler

    def resize_cache(self, rows: int) -> bool:
        if self._scheduler.block_space_manager.num_used_rows > rows:
            return False
        self.cache_rows = rows
        return True


def make_member(folder: Path, clock: Callable[[], float]) -> EngineCore:
    scheduler = make_scheduler(SchedulerConfig(), VirtualBlockSpaceManager(CacheCapacity(400, 1, 1)), MAX_MODEL_LEN)
    executor = ElasticExecutor(scheduler)
    return EngineCore(
        scheduler, executor, clock, SharedCacheBudget(scheduler, executor, BudgetGroup(folder, 400), clock)
    )


def test_two_cores_under_load_share_and_finish_everything(tmp_path: Path) -> None:
    """Each could use more than the total; requests of one core arrive first, those of the other when it has all."""
    rng, clock = random.Random(SEED), itertools.count().__next__
    cores = [make_member(tmp_path, clock) for _ in range(2)]
    lengths: list[dict[str, int]] = [{}, {}]
    held: list[tuple[int, ...]] = []

    def add(at: int, count: int) -> None:
        for number in range(count):
            prompt, output = tuple(rng.choices(range(256), k=rng.randint(1, 150))), rng.randint(2, 49)
            params = SamplingParams(temperature=0, max_tokens=output, ignore_eos=True)
            cores[at].add_requests([NewRequest(f"{at}.{number}", prompt, params)])
            lengths[at][f"{at}.{number}"] = output

    def run_once() -> None:
        for at, core in enumerate(cores):
            core.balance()
            for update in core.step().updates if core.has_work else ():
                lengths[at][update.request_id] -= len(update.tokens)
                assert update.finish_reason in (None, "length")
                assert (update.finish_reason is None) == (lengths[at][update.request_id] > 0)
        held.append(tuple(core.executor.cache_rows for core in cores))
        assert sum(held[-1]) <= 400

    add(0, 30)
    for _ in range(10):
        run_once()
    assert held[-1][0] > 350
    add(1, 30)
    for _ in range(5):
        run_once()
    assert abs(held[-1][0] - held[-1][1]) <= 200
    for _ in range(5000):
        if not any(core.has_work for core in cores):
            break
        run_once()
    assert not any(length for each in lengths for length in each.values())
    assert cores[0].scheduler.num_preemptions > 0


def test_a_member_that_sleeps_holds_nothing_and_wakes_with_its_share(tmp_path: Path) -> None:
    clock = itertools.count().__next__
    one, other = (make_member(tmp_path, clock) for _ in range(2))
    one.sleep()
    for core in (one, other, one, other):
        core.balance()
    assert (one.executor.cache_rows, other.executor.cache_rows) == (0, 400)
    one.wake_up()
    one.add_requests([NewRequest("a", (1, 2, 3), SamplingParams(temperature=0, max_tokens=3, ignore_eos=True))])
    tokens = []
    for _ in range(20):
        for core in (one, other):
            core.balance()
            tokens += [token for update in core.step().updates for token in update.tokens] if core.has_work else []
    assert len(tokens) == 3
    with pytest.raises(ValueError, match="its kv_budget_group determines it"):
        one.set_cache_budget(10)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "kv_budget_group is 'pair': it needs memory_bytes"),
        ({"memory_bytes": 1000, "tensor_parallel_size": 2}, "it shares the memory of one device"),
        ({"memory_bytes": 1000, "prefill_decode": True}, "of one device, and prefill_decode has two"),
        ({"kv_budget_group": "a/b"}, "kv_budget_group is 'a/b': it must be letters"),
    ],
)
def test_what_no_group_can_share_is_refused(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        build_core(make_config(**{"kv_budget_group": "pair", **settings}))


def test_an_engine_of_this_process_joins_no_group() -> None:
    with pytest.raises(ValueError, match="needs its own process"):
        LLMEngine.from_config(make_config(kv_budget_group="pair"))
