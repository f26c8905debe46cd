"""`LLM`: offline inference in one Python object. Thread-safe.

with LLM("smollm2-135m") as llm:
    [output] = llm.generate("The capital of France is", SamplingParams(temperature=0))
    print(output.outputs[0].text)
"""

import itertools
import logging
import os
import threading
import time
import weakref
from collections import deque
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager
from dataclasses import replace
from types import TracebackType
from typing import Any, NoReturn

from sarathi.config.load import make_config
from sarathi.config.schema import EngineConfig
from sarathi.containers import is_list
from sarathi.engine.input_processor import (
    AnyPrompt,
    Params,
    Prompts,
    encode_chat,
    list_prompts,
    params_of_each,
    plain_prompt,
)
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.outputs import RequestOutput
from sarathi.engine.tokenizer.chat_template import Conversation
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.progress import show_progress
from sarathi.messages import MemoryStats, PrefixCacheStats
from sarathi.sampling_params import SamplingParams
from sarathi.wording import short_repr

logger = logging.getLogger(__name__)
_ASLEEP_LOOK_S = 0.01
_Lock = Any  # an RLock, for its _is_owned(), which threading.Condition uses too


class LLM:
    """A loaded model. `close`, the end of a `with` block, or deletion frees its memory.

    Threads may share it: their requests are batched together.
    """

    def __init__(self, model: str = "smollm2-135m", **settings: object) -> None:
        """Load `model`: a known name, a folder, a .gguf file or a hub id. `settings` are knobs of the configuration
        by name, as `max_num_seqs=16` or `attention_backend="sdpa_vattn_megacache"`; an unknown one is a ValueError."""
        self._own(*_load(make_config(model=model, **settings)))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """An LLM with the configuration `config`."""
        llm = cls.__new__(cls)
        llm._own(*_load(config))
        return llm

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """An LLM that takes ownership of an existing engine."""
        llm = cls.__new__(cls)
        llm._own(engine, "of an engine")
        return llm

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None if the model has none, as with random weights; prompts must then be token ids."""
        return self.engine.tokenizer

    def generate(self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete one or more prompts in batches; outputs are in the order of the prompts.

        A prompt is text, a list or array of token ids, or `{"prompt": ...}` / `{"prompt_token_ids": ...}`; kinds may be
        mixed. `sampling_params`: for all prompts, or a list with one for each. ValueError names the invalid prompt;
        then none runs, and the engine stays usable.
        """
        given = list_prompts(prompts)
        with closing(self._stream(given, sampling_params)) as stream:
            outputs = show_progress(stream, len(given)) if use_tqdm else stream
            finished = {number: output for number, output in outputs if output.finished}
        return [finished[number] for number in range(len(given))]

    def chat(
        self, messages: Conversation | Sequence[Conversation], sampling_params: Params = None, use_tqdm: bool = True,
        **options: Any,
    ) -> list[RequestOutput]:  # fmt: skip
        """Answer one or more conversations in the model's chat format; otherwise like `generate`.

        options: see `encode_chat`.
        """
        single = not is_list(messages) or not len(messages) or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        prompts = [self.encode_chat(each, **options) for each in conversations]
        outputs = self.generate(prompts, sampling_params, use_tqdm)
        return [replace(each, prompt=self._text_of(ids)) for each, ids in zip(outputs, prompts, strict=True)]

    def stream(self, prompt: AnyPrompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt; yields an output after each token. Leaving the loop early aborts it."""
        return (output for _, output in self.stream_all([prompt], sampling_params))

    def stream_all(
        self, prompts: Sequence[AnyPrompt], sampling_params: Params = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Complete prompts in batches; yields (index of the prompt, output) after each token and at the end.

        Leaving the loop early aborts unfinished prompts. If one prompt is invalid, none is added.
        """
        if not is_list(prompts):
            raise ValueError(f"prompts is {short_repr(prompts)}: it must be a list of prompts")
        return self._stream(prompts, sampling_params)

    def encode_chat(self, conversation: Conversation, **options: Any) -> list[int]:
        """Token ids of a conversation, up to the start of the assistant's answer; for the options see
        `sarathi.engine.input_processor.encode_chat`."""
        return encode_chat(self.tokenizer, conversation, **options)

    def sleep(self, level: int = 1) -> None:
        """Release the KV cache's memory between two steps. Streams wait until `wake_up`.

        level: 1: the cache; 2: the weights too. ValueError for another level, and for 2 on a GPU.
        """
        with self._using_engine():
            self.engine.core.sleep(level)

    def wake_up(self) -> None:
        """Allocate the memory and reload released weights. Running requests are recomputed.

        ValueError if the checkpoint can no longer be read: the engine stays asleep.
        """
        with self._using_engine():
            self.engine.core.wake_up()

    def reset_prefix_cache(self) -> bool:
        """Drop cached prefixes, for example after the weights changed. Does nothing and returns False while requests
        are unfinished."""
        with self._using_engine():
            return self.engine.reset_prefix_cache()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Prefix cache hits so far, and the rows kept for finished requests."""
        with self._using_engine():
            return self.engine.prefix_cache_stats()

    def memory_stats(self) -> MemoryStats:
        """Current and peak memory of the KV cache, in bytes."""
        with self._using_engine():
            return self.engine.memory_stats()

    def close(self) -> None:
        """Free the memory of cache and model; open streams end with an error. Idempotent.

        Waits until no other thread is in a step.
        """
        if os.getpid() == self._process_id and self._lock._is_owned():
            self._refuse_use()
        self._finalizer()

    def __enter__(self) -> "LLM":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()

    def __repr__(self) -> str:
        facts, found = self.engine.core.facts, self.engine.core.facts.resolution
        return (
            f"LLM({self._model!r}, attention_backend={found.backend!r}, dtype={found.dtype!r}, "
            f"device={found.device!r}, max_model_len={facts.max_model_len}, "
            f"KV cache of {facts.num_cache_tokens} tokens, prefix_caching={found.prefix_caching})"
        )

    def _own(self, engine: LLMEngine, model: str) -> None:
        self.engine, self._model = engine, model
        logger.info("%r is ready", self)
        self._ids = map(str, itertools.count())
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._closed: deque[set[str]] = deque()  # unfinished requests of each closed stream
        self._lock: _Lock = threading.RLock()  # held by the thread that uses the engine; never acquired twice
        self._next = threading.Lock()  # held by the next thread in line, so the last owner cannot overtake it
        self._process_id = os.getpid()
        self._finalizer = weakref.finalize(self, _shut_down, engine, self._next, self._lock, self._process_id)

    def _text_of(self, prompt: list[int]) -> str | None:
        return None if self.tokenizer is None else self.tokenizer.decode(prompt, skip_special_tokens=False)

    def _stream(self, prompts: Sequence[AnyPrompt], params: Params) -> Generator[tuple[int, RequestOutput], None, None]:
        each_params = params_of_each(params, len(prompts))
        numbers = {next(self._ids): number for number in range(len(prompts))}
        pending, inbox = set(numbers), deque[RequestOutput]()
        try:
            with self._using_engine():
                self._inboxes.update(dict.fromkeys(numbers, inbox))
                self._add_all(numbers, prompts, each_params)
            while pending:
                self._fill(inbox, pending)
                while inbox:
                    output = inbox.popleft()
                    if output.finished:
                        pending.discard(output.request_id)
                    yield numbers[output.request_id], output
        finally:
            self._closed.append(pending)
            self._abort_closed()

    def _add_all(
        self, numbers: Mapping[str, int], prompts: Sequence[AnyPrompt], params: Sequence[SamplingParams]
    ) -> None:
        """Add a request for each of `numbers`. With several prompts, a ValueError names the index."""
        number = 0
        try:
            for request_id, number in numbers.items():
                prompt = prompts[number]
                self.engine.add_request(
                    request_id, plain_prompt(prompt) if isinstance(prompt, Mapping) else prompt, params[number]
                )
        except ValueError as error:
            if len(prompts) == 1:
                raise
            raise ValueError(f"prompt {number} of {len(prompts)}, counted from 0: {error}") from error

    def _fill(self, inbox: deque[RequestOutput], pending: Iterable[str]) -> None:
        """Step until one of `pending` has an output; outputs of other streams go to their inboxes.

        Waiting threads take turns to step, each on behalf of all.
        """
        while not inbox:
            if self.engine.core.is_asleep:
                time.sleep(_ASLEEP_LOOK_S)
            with self._using_engine():
                if inbox:  # another thread has stepped meanwhile
                    return
                if not any(map(self.engine.is_unfinished, pending)):
                    raise RuntimeError(
                        "the requests of this stream ended before it: the LLM was closed, or a step failed that "
                        "another stream asked for"
                    )
                for output in self.engine.step():
                    if output.request_id in self._inboxes:
                        self._inboxes[output.request_id].append(output)
                    if output.finished:
                        self._inboxes.pop(output.request_id, None)

    @contextmanager
    def _using_engine(self) -> Iterator[None]:
        """Exclusive use of the engine. Streams that the garbage collector closes meanwhile are aborted at the end of
        the block."""
        if os.getpid() != self._process_id or self._lock._is_owned():
            self._refuse_use()
        try:
            with self._next:
                self._lock.acquire()
            yield
        finally:
            if self._lock._is_owned():  # Ctrl-C may come before it is acquired
                self._lock.release()
            self._abort_closed()

    def _refuse_use(self) -> NoReturn:
        """Raise: a forked process lacks the engine's threads, and the parent owns memory and GPU context."""
        if os.getpid() == self._process_id:
            raise RuntimeError("this LLM is already executing a step in this thread: it cannot be used recursively")
        raise RuntimeError(
            f"this LLM belongs to process {self._process_id}, and process {os.getpid()} was forked from it: create "
            "an LLM in each process, or start processes with multiprocessing's 'spawn' method"
        )

    def _abort_closed(self) -> None:
        """Abort the requests of closed streams. If another thread uses the engine, that thread does it."""
        is_usable = os.getpid() == self._process_id and not self._lock._is_owned()
        while self._closed and is_usable and self._lock.acquire(blocking=False):
            try:
                for request_id in self._closed.popleft():
                    self.engine.abort(request_id)
                    self._inboxes.pop(request_id, None)
                self.engine.release_ended()
            finally:
                self._lock.release()


def _load(config: EngineConfig) -> tuple[LLMEngine, str]:
    """The engine for `config`, and the model's name."""
    return LLMEngine.from_config(config), config.model.model


def _shut_down(engine: LLMEngine, queue: threading.Lock, lock: _Lock, process_id: int) -> None:
    """Shut down when no thread is in a step. Does nothing in a forked process."""
    if os.getpid() == process_id:
        with queue, lock:
            engine.shutdown()
