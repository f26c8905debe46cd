"""Work in which prompts share a prefix, the same for every engine: many sharers, conversations, documents."""

import random
import time
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple

from sarathi.benchmark.engines.load import Engine
from sarathi.benchmark.records import Record, Table
from sarathi.benchmark.workload.lengths import lognormal_requests

STAGES = ("sharers", "conversations", "documents")
_LONGEST_SUFFIX = 2048  # tokens of a sharer's own prompt


class PrefixSizes(NamedTuple):
    """Lengths in tokens."""

    sharers: int  # requests over one prefix
    prefix: int
    conversations: int
    turns: int  # of each conversation
    user: int  # of a turn
    answer: int
    documents: int
    document: int
    questions: int  # to each document
    question: int
    document_answer: int
    repeats: int  # of the first token's time


FULL = PrefixSizes(256, 4096, 64, 6, 200, 150, 8, 32768, 6, 32, 64, 5)
SMALL = PrefixSizes(6, 128, 3, 3, 20, 10, 2, 128, 2, 8, 4, 2)


class PrefixLoad:
    """Requests of random tokens for one engine, and a record for each work."""

    def __init__(self, engine: Engine, table: Table, model: str, sizes: PrefixSizes, seed: int) -> None:
        self.engine, self.table, self.model, self.sizes, self.seed = engine, table, model, sizes, seed
        self._random = random.Random(seed)

    def plan(self, stages: Sequence[str]) -> Iterator[tuple[str, Callable[[], None]]]:
        """Records as (name, thunk), in the order of the stages."""
        works = {"sharers": self.sharers, "conversations": self.talk, "documents": self.read_documents}
        return ((stage, works[stage]) for stage in stages)

    def sharers(self) -> None:
        """Requests that arrive at once, all with the same prefix and an own suffix, with the lengths of chats."""
        sizes = self.sizes
        lengths = lognormal_requests(sizes.sharers, self.seed, self.engine.max_model_len - sizes.prefix)
        prefix = self._tokens(sizes.prefix)
        requests = [([*prefix, *self._tokens(min(own, _LONGEST_SUFFIX))], output) for own, output in lengths]
        name = f"{sizes.sharers} requests over one prefix of {sizes.prefix}"
        self._record(name, sizes.sharers, sizes.prefix, self._seconds(requests))

    def talk(self) -> None:
        """Conversations side by side. Each turn sends everything before it, as soon as the answer is complete."""
        sizes = self.sizes
        start_s = time.perf_counter()
        talks = {self._ask(prompt): prompt for prompt in self._prompts(sizes.conversations, sizes.user)}
        left = dict.fromkeys(talks, sizes.turns - 1)
        answers: dict[str, list[int]] = {name: [] for name in talks}
        while self.engine.has_work:
            for name, tokens in self.engine.step():
                answers[name] += tokens
                if len(answers[name]) == sizes.answer and left[name]:
                    prompt = [*talks[name], *answers[name], *self._tokens(sizes.user)]
                    following = self._ask(prompt)
                    talks[following], left[following], answers[following] = prompt, left[name] - 1, []
        name = f"{sizes.conversations} conversations of {sizes.turns} turns"
        self._record(name, sizes.conversations, sizes.user + sizes.answer, time.perf_counter() - start_s)

    def read_documents(self) -> None:
        """Questions to documents: all at once, then in rounds to known documents, then the first token of one more."""
        sizes = self.sizes
        documents = self._prompts(sizes.documents, sizes.document)
        at_once = [question for _ in range(sizes.questions) for question in self._questions(documents)]
        name = f"{sizes.documents} documents, {len(at_once)} questions"
        self._record(f"{name} at once", len(at_once), sizes.document, self._seconds(at_once))
        rounds = [self._seconds(self._questions(documents)) for _ in range(sizes.questions)]
        self._record(f"{name} to known ones in rounds", len(at_once), sizes.document, sum(rounds))
        firsts = sorted(self._first_token_s(documents[-1]) for _ in range(sizes.repeats))
        self._record("first token on a known document", 1, sizes.document, firsts[len(firsts) // 2])

    def _questions(self, documents: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        sizes = self.sizes
        return [([*document, *self._tokens(sizes.question)], sizes.document_answer) for document in documents]

    def _first_token_s(self, document: list[int]) -> float:
        start_s = time.perf_counter()
        self.engine.add([*document, *self._tokens(self.sizes.question)], 1)
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start_s

    def _ask(self, prompt: list[int]) -> str:
        return self.engine.add(prompt, self.sizes.answer)

    def _seconds(self, requests: Sequence[tuple[list[int], int]]) -> float:
        """From the arrival of requests, all at once, to the end of the last one."""
        start_s = time.perf_counter()
        for prompt, output_tokens in requests:
            self.engine.add(prompt, output_tokens)
        while self.engine.has_work:
            self.engine.step()
        return time.perf_counter() - start_s

    def _prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [self._tokens(tokens) for _ in range(count)]

    def _tokens(self, count: int) -> list[int]:
        return self._random.choices(range(3, self.engine.vocab_size - 3), k=count)

    def _record(self, work: str, batch: int, context: int, seconds: float) -> None:
        self.table.add(Record(self.model, work, self.engine.backend, batch, context, seconds, "s"))
