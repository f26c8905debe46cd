"""The engine as one Python object, for prompts that are all there at once. Threads may share it.

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
_Lock = Any  # an RLock, which alone knows its owner: _is_owned() is what threading.Condition asks too


class LLM:
    """A model ready to answer. Its memory is freed by `close`, at the end of a `with`, or when it is deleted.

    Threads may share one: their requests run in common batches.
    """

    def __init__(self, model: str = "smollm2-135m", **settings: object) -> None:
        """Load `model`: a known name, a folder, a .gguf file or a hub id. `settings` are knobs of the configuration
        by name, as `max_num_seqs=16` or `attention_backend="sdpa_vattn_megacache"`; an unknown one is a ValueError."""
        self._take(*_load(make_config(model=model, **settings)))

    @classmethod
    def from_config(cls, config: EngineConfig) -> "LLM":
        """An LLM as `config` describes it."""
        llm = cls.__new__(cls)
        llm._take(*_load(config))
        return llm

    @classmethod
    def from_engine(cls, engine: LLMEngine) -> "LLM":
        """An LLM over an engine that is there already, which it will shut down."""
        llm = cls.__new__(cls)
        llm._take(engine, "of an engine")
        return llm

    @property
    def tokenizer(self) -> Tokenizer | None:
        """None for a bare configuration with random weights: prompts are token ids then."""
        return self.engine.tokenizer

    def generate(self, prompts: Prompts, sampling_params: Params = None, use_tqdm: bool = True) -> list[RequestOutput]:
        """Complete one prompt or many, together; outputs in the order of the prompts.

        A prompt is text, a list or array of token ids, or `{"prompt": ...}` / `{"prompt_token_ids": ...}`; kinds may be
        mixed. `sampling_params` is for all, or a list with one for each. A ValueError names the prompt that is at
        fault; nothing runs then, and the engine stays usable.
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
        """Answer one conversation or many, in the model's own chat format; otherwise as `generate`.

        options: see `encode_chat`.
        """
        single = not is_list(messages) or not len(messages) or isinstance(messages[0], Mapping)
        conversations: Sequence[Any] = [messages] if single else messages
        prompts = [self.encode_chat(each, **options) for each in conversations]
        outputs = self.generate(prompts, sampling_params, use_tqdm)
        return [replace(each, prompt=self._text_of(ids)) for each, ids in zip(outputs, prompts, strict=True)]

    def stream(self, prompt: AnyPrompt, sampling_params: SamplingParams | None = None) -> Iterator[RequestOutput]:
        """Complete one prompt, with an output after each of its tokens; leaving the loop early aborts it."""
        return (output for _, output in self.stream_all([prompt], sampling_params))

    def stream_all(
        self, prompts: Sequence[AnyPrompt], sampling_params: Params = None
    ) -> Iterator[tuple[int, RequestOutput]]:
        """Complete prompts together; (number of the prompt, output) whenever one got a token or ended.

        Leaving the loop early, by an exception or not, aborts those that are not done. All are added or none.
        """
        if not is_list(prompts):
            raise ValueError(f"prompts is {short_repr(prompts)}: it must be a list of prompts")
        return self._stream(prompts, sampling_params)

    def encode_chat(self, conversation: Conversation, **options: Any) -> list[int]:
        """Token ids of a conversation up to where the assistant's answer begins; for the options see
        `sarathi.engine.input_processor.encode_chat`."""
        return encode_chat(self.tokenizer, conversation, **options)

    def sleep(self, level: int = 1) -> None:
        """Give the memory of the KV cache back to the system, between two steps. Streams wait until `wake_up`.

        level: 1: the cache; 2: the weights too. ValueError for another level, and for 2 on a GPU.
        """
        with self._using_engine():
            self.engine.core.sleep(level)

    def wake_up(self) -> None:
        """Take the memory again, and read weights that were given back. Requests that were running are computed again.

        ValueError where the checkpoint cannot be read any more: the engine goes on sleeping.
        """
        with self._using_engine():
            self.engine.core.wake_up()

    def reset_prefix_cache(self) -> bool:
        """Forget the tokens of ended requests, as after a change of weights; False, with nothing done, while a request
        has not ended."""
        with self._using_engine():
            return self.engine.reset_prefix_cache()

    def prefix_cache_stats(self) -> PrefixCacheStats:
        """Tokens found in the cache so far, and what is kept of ended requests."""
        with self._using_engine():
            return self.engine.prefix_cache_stats()

    def memory_stats(self) -> MemoryStats:
        """What the KV cache holds now, and at its peak, in bytes."""
        with self._using_engine():
            return self.engine.memory_stats()

    def close(self) -> None:
        """Free all memory, of the cache and of the model; open streams end with an error. May be called again.

        Waits for a step that runs in another thread.
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

    def _take(self, engine: LLMEngine, model: str) -> None:
        self.engine, self._model = engine, model
        logger.info("%r is ready", self)
        self._ids = map(str, itertools.count())
        self._inboxes: dict[str, deque[RequestOutput]] = {}
        self._left: deque[set[str]] = deque()  # of each stream that is over, its requests that had not ended
        self._lock: _Lock = threading.RLock()  # held by the thread that uses the engine, which never takes it twice
        self._next = threading.Lock()  # held by the thread that gets it next: the one that had it last comes later
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
            self._left.append(pending)
            self._end_left()

    def _add_all(
        self, numbers: Mapping[str, int], prompts: Sequence[AnyPrompt], params: Sequence[SamplingParams]
    ) -> None:
        """One request for each of `numbers`; the ValueError of one among several says which prompt it is about."""
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
        """Step until there is an output for one of `pending`; outputs of other streams go to their inboxes.

        The threads that wait for outputs step in turn, each for all.
        """
        while not inbox:
            if self.engine.core.is_asleep:
                time.sleep(_ASLEEP_LOOK_S)
            with self._using_engine():
                if inbox:  # another thread was here in between
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
        """The engine for this thread alone. Streams that end meanwhile, because they are collected as garbage at some
        allocation, end afterwards."""
        if os.getpid() != self._process_id or self._lock._is_owned():
            self._refuse_use()
        try:
            with self._next:
                self._lock.acquire()
            yield
        finally:
            if self._lock._is_owned():  # not where Ctrl-C came before
                self._lock.release()
            self._end_left()

    def _refuse_use(self) -> NoReturn:
        """A forked process has none of the engine's threads, and its parent owns the memory and the GPU context."""
        if os.getpid() == self._process_id:
            raise RuntimeError("this LLM is in the middle of a step of the same thread: it cannot be used from there")
        raise RuntimeError(
            f"this LLM belongs to process {self._process_id}, and process {os.getpid()} was forked from it: create "
            "an LLM in each process, or start processes with multiprocessing's 'spawn' method"
        )

    def _end_left(self) -> None:
        """End the streams that are over, unless some thread uses the engine: that thread ends them afterwards."""
        is_usable = os.getpid() == self._process_id and not self._lock._is_owned()
        while self._left and is_usable and self._lock.acquire(blocking=False):
            try:
                for request_id in self._left.popleft():
                    self.engine.abort(request_id)
                    self._inboxes.pop(request_id, None)
                self.engine.release_ended()
            finally:
                self._lock.release()


def _load(config: EngineConfig) -> tuple[LLMEngine, str]:
    """The engine that `config` describes, and its model's name."""
    return LLMEngine.from_config(config), config.model.model


def _shut_down(engine: LLMEngine, queue: threading.Lock, lock: _Lock, process_id: int) -> None:
    """Once no thread is in a step. A forked process leaves the engine to the one that made it."""
    if os.getpid() == process_id:
        with queue, lock:
            engine.shutdown()
