"""A scheduler without sense: random mixed batches, chunk sizes, orders and preemptions, to drive a real executor."""

import random
from dataclasses import dataclass, field

from sarathi.executor.ranks.multiproc import MultiprocExecutor
from sarathi.executor.uniproc import UniprocExecutor
from sarathi.messages import Chunk, NewRequest, SampledToken, SchedulerOutput, StepResult
from sarathi.sampling_params import SamplingParams


@dataclass
class Driven:
    """One request and how far it is."""

    request: NewRequest
    num_outputs: int
    is_paged: bool
    num_tokens: int
    sent: bool = False
    computed: int = 0
    blocks: list[int] = field(default_factory=list)
    tokens: list[SampledToken] = field(default_factory=list)

    @property
    def done(self) -> bool:
        return len(self.tokens) == self.num_outputs


class RandomDriver:
    """Runs requests to their end; every step is random, but a seed repeats it."""

    def __init__(self, executor: UniprocExecutor | MultiprocExecutor, seed: int) -> None:
        self.executor, self.rng = executor, random.Random(seed)
        self.is_paged = executor.capacity.token_bytes == 1
        self.free = list(range(executor.capacity.rows)) if self.is_paged else []
        self.step_id = 0
        self.preemptions = 0

    def run(
        self, prompts: dict[str, list[int]], params: SamplingParams, num_outputs: int
    ) -> dict[str, list[SampledToken]]:
        """The tokens of each prompt, all requests of this call sharing batches."""
        requests = [
            Driven(NewRequest(name, tuple(prompt), params), num_outputs, self.is_paged, len(prompt))
            for name, prompt in prompts.items()
        ]
        finished: list[str] = []
        while live := [each for each in requests if not each.done]:
            finished += self._step(live)
        self.executor.execute(SchedulerOutput(self.step_id, finished=tuple(finished)))
        self.executor.check_integrity()
        return {each.request.request_id: each.tokens for each in requests}

    def _step(self, live: list[Driven]) -> list[str]:
        preempted = [each for each in live if each.computed and self.rng.random() < 0.05]
        for each in preempted:
            self._release(each)
            each.computed = 0
        self.preemptions += len(preempted)
        chosen = self.rng.sample(live, self.rng.randint(1, len(live)))
        new = tuple(each.request for each in chosen if not each.sent)
        chunks = tuple(self._chunk(each) for each in chosen)
        names = tuple(each.request.request_id for each in preempted)
        result = self.executor.execute(SchedulerOutput(self.step_id, new, chunks, names))
        return self._take(result, {each.request.request_id: each for each in chosen})

    def _chunk(self, each: Driven) -> Chunk:
        each.sent = True
        remaining = each.num_tokens - each.computed
        count = self.rng.choice([remaining, self.rng.randint(1, remaining)])
        start, each.computed = each.computed, each.computed + count
        wanted = -(-each.num_tokens // self.executor.capacity.page_bytes) if self.is_paged else 0
        blocks = tuple(self._take_block() for _ in range(wanted - len(each.blocks)))
        each.blocks.extend(blocks)
        return Chunk(each.request.request_id, start, count, count == remaining, each.num_tokens, blocks)

    def _take_block(self) -> int:
        return self.free.pop(self.rng.randrange(len(self.free)))

    def _take(self, result: StepResult, chosen: dict[str, Driven]) -> list[str]:
        self.step_id += 1
        for token in result.tokens:
            each = chosen[token.request_id]
            each.tokens.append(token)
            each.num_tokens += 1
            if each.done:
                self._release(each)
        return [each.request.request_id for each in chosen.values() if each.done]

    def _release(self, each: Driven) -> None:
        self.free.extend(each.blocks)
        each.blocks.clear()
