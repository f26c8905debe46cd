"""Workloads with shared prefixes, equal for every engine: one common prefix, conversations, documents."""

import time
from collections.abc import Callable, Iterator, Sequence
from statistics import median
from typing import NamedTuple

from sarathi.benchmark.engines.load import Load
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
    """Runs requests of random tokens on a load's engine, and records each workload."""

    def __init__(self, load: Load, sizes: PrefixSizes) -> None:
        self.load, self.engine, self.sizes = load, load.engine, sizes

    def plan(self, stages: Sequence[str]) -> Iterator[tuple[str, Callable[[], None]]]:
        """Work in the order of `stages`."""
        works = {"sharers": self.sharers, "conversations": self.talk, "documents": self.read_documents}
        return ((stage, works[stage]) for stage in stages)

    def sharers(self) -> None:
        """Requests that arrive at once: a common prefix, a suffix of their own, and chat-like output lengths."""
        sizes = self.sizes
        lengths = lognormal_requests(sizes.sharers, self.load.seed, self.engine.max_model_len - sizes.prefix)
        prefix = self.load.prompt(sizes.prefix)
        requests = [([*prefix, *self.load.prompt(min(own, _LONGEST_SUFFIX))], output) for own, output in lengths]
        name = f"{sizes.sharers} requests over one prefix of {sizes.prefix}"
        self.load.record(name, sizes.sharers, sizes.prefix, self._seconds(requests), "s")

    def talk(self) -> None:
        """Concurrent conversations. Each turn sends the whole history as soon as the previous answer is complete."""
        sizes = self.sizes
        start_s = time.perf_counter()
        talks = {
            self.engine.add(prompt, sizes.answer): prompt for prompt in self._prompts(sizes.conversations, sizes.user)
        }
        left = dict.fromkeys(talks, sizes.turns - 1)
        answers: dict[str, list[int]] = {name: [] for name in talks}
        while self.engine.has_work:
            for name, tokens in self.engine.step():
                answers[name] += tokens
                if len(answers[name]) == sizes.answer and left[name]:
                    prompt = [*talks[name], *answers[name], *self.load.prompt(sizes.user)]
                    following = self.engine.add(prompt, sizes.answer)
                    talks[following], left[following], answers[following] = prompt, left[name] - 1, []
        name = f"{sizes.conversations} conversations of {sizes.turns} turns"
        seconds = time.perf_counter() - start_s
        self.load.record(name, sizes.conversations, sizes.user + sizes.answer, seconds, "s")

    def read_documents(self) -> None:
        """Questions about documents: all at once, in rounds on cached documents, and time to first token on one."""
        sizes = self.sizes
        documents = self._prompts(sizes.documents, sizes.document)
        at_once = [question for _ in range(sizes.questions) for question in self._questions(documents)]
        name = f"{sizes.documents} documents, {len(at_once)} questions"
        self.load.record(f"{name} at once", len(at_once), sizes.document, self._seconds(at_once), "s")
        rounds = [self._seconds(self._questions(documents)) for _ in range(sizes.questions)]
        self.load.record(f"{name} to known ones in rounds", len(at_once), sizes.document, sum(rounds), "s")
        last = documents[-1]
        firsts = [self._seconds([([*last, *self.load.prompt(sizes.question)], 1)]) for _ in range(sizes.repeats)]
        self.load.record("first token on a known document", 1, sizes.document, median(firsts), "s")

    def _questions(self, documents: Sequence[list[int]]) -> list[tuple[list[int], int]]:
        sizes = self.sizes
        return [([*document, *self.load.prompt(sizes.question)], sizes.document_answer) for document in documents]

    def _seconds(self, requests: Sequence[tuple[list[int], int]]) -> float:
        """Seconds from the requests' common arrival to the end of the last one."""
        start_s = time.perf_counter()
        for prompt, output_tokens in requests:
            self.engine.add(prompt, output_tokens)
        self.load.drain()
        return time.perf_counter() - start_s

    def _prompts(self, count: int, tokens: int) -> list[list[int]]:
        return [self.load.prompt(tokens) for _ in range(count)]
