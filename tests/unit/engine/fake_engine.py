"""An engine over a model of a few lines, so that everything but the model is real; needs neither torch nor weights."""

import time
from collections.abc import Callable, Sequence

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

from sarathi.config.schema import SchedulerConfig
from sarathi.core.block_space_manager.virtual import VirtualBlockSpaceManager
from sarathi.core.scheduler import make_scheduler
from sarathi.engine.core import EngineCore
from sarathi.engine.llm_engine import LLMEngine
from sarathi.engine.tokenizer.chat_template import jinja_renderer
from sarathi.engine.tokenizer.tokenizer import Tokenizer as SarathiTokenizer
from sarathi.messages import (
    CacheCapacity,
    CompletedStep,
    MemoryStats,
    Resolution,
    SampledToken,
    SchedulerOutput,
    StepResult,
)
from sarathi.metrics import MetricsSink
from sarathi.sampling_params import SamplingParams

END = 256  # the token after the 256 bytes
VOCAB_SIZE = 257
MAX_MODEL_LEN = 200
CAPACITY = CacheCapacity(1000, token_bytes=1, page_bytes=1)
CHAT_TEMPLATE = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n{% endfor %}assistant:"


class FakeExecutor:
    """A model whose next token is `next_token(all tokens so far, parameters)`; checks the messages it gets."""

    vocab_size, max_model_len, token_bytes = VOCAB_SIZE, MAX_MODEL_LEN, 1
    resolution = Resolution("no_op_vattn", "cpu", "float32", 2.0**-23)
    max_in_flight, takes_functions = 1, True
    health_check_interval_s: float | None = None

    def __init__(
        self, next_token: Callable[[Sequence[int], SamplingParams], int], capacity: CacheCapacity = CAPACITY
    ) -> None:
        self.capacity = capacity
        self.next_token = next_token
        self.tokens: dict[str, list[int]] = {}
        self.params: dict[str, SamplingParams] = {}
        self.is_shut_down = False
        self.fail_next: Exception | None = None

    def launch(self, out: SchedulerOutput) -> CompletedStep:
        assert not self.is_shut_down
        return CompletedStep(self.execute(out))

    def execute(self, out: SchedulerOutput) -> StepResult:
        if self.fail_next is not None:
            error, self.fail_next = self.fail_next, None
            raise error
        for request_id in out.finished:
            self.tokens.pop(request_id, None)  # not known if the step that brought it failed
        for new in out.new_requests:
            self.tokens[new.request_id] = list(new.token_ids)
            self.params[new.request_id] = new.sampling_params
        return StepResult(out.step_id, tuple(self._sample(chunk.request_id) for chunk in out.chunks if chunk.samples))

    def _sample(self, request_id: str) -> SampledToken:
        tokens, params = self.tokens[request_id], self.params[request_id]
        token_id = self.next_token(tokens, params)
        tokens.append(token_id)
        if params.logprobs is None:
            return SampledToken(request_id, token_id)
        return SampledToken(request_id, token_id, -0.5, tuple((rank, -1.0 - rank) for rank in range(params.logprobs)))

    def check_health(self) -> None:
        """There is no rank that could die."""

    def wait(self) -> None:
        """Steps are over when launch() returns."""

    def memory_stats(self) -> MemoryStats:
        return MemoryStats(mapped_bytes=sum(map(len, self.tokens.values())))

    def resize_cache(self, rows: int) -> bool:
        self.cache_rows = rows
        return True

    def drop_weights(self) -> None:
        """There are none."""

    load_weights = drop_weights

    def shutdown(self) -> None:
        self.is_shut_down = True


def byte_tokenizer() -> SarathiTokenizer:
    """One token a byte, and an end token: every character beyond ASCII is split."""
    backend = Tokenizer(models.BPE({char: byte for byte, char in _stand_ins().items()}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    backend.add_special_tokens([AddedToken("<end>", normalized=False)])
    return SarathiTokenizer(backend, {END}, jinja_renderer(CHAT_TEMPLATE, {}))


def _stand_ins() -> dict[int, str]:
    """Which character stands for which byte, asked of `tokenizers`; bytes not found in UTF-8 stand for themselves."""
    starts = [*range(0x801), *range(0x1000, 0x10000, 0x1000), *range(0x10000, 0x110000, 0x40000)]
    text = "".join(map(chr, starts))
    [(shown, _)] = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False).pre_tokenize_str(text)
    return {byte: chr(byte) for byte in range(256)} | dict(zip(text.encode(), shown, strict=True))


def says(text: str) -> Callable[[Sequence[int], SamplingParams], int]:
    """A model that answers `text`, then the end token, to any prompt that ends in 0x00."""
    answer = [*text.encode(), END]

    def next_token(tokens: Sequence[int], params: SamplingParams) -> int:
        start = len(tokens) - list(reversed(tokens)).index(0)
        return answer[min(len(tokens) - start, len(answer) - 1)]

    return next_token


def echo(tokens: Sequence[int], params: SamplingParams) -> int:
    """A model whose next token depends on all before it and on the seed."""
    return (sum(position * token for position, token in enumerate(tokens, 1)) + (params.seed or 0) * 31) % 256


def make_engine(
    next_token: Callable[[Sequence[int], SamplingParams], int] = echo,
    rows: int = 1000,
    has_tokenizer: bool = True,
    clock: Callable[[], float] = time.monotonic,
    metrics: MetricsSink | None = None,
    **config: int,
) -> LLMEngine:
    """A real scheduler and block space manager of `rows` tokens over the fake executor."""
    capacity = CacheCapacity(rows, token_bytes=1, page_bytes=1)
    scheduler = make_scheduler(SchedulerConfig(**config), VirtualBlockSpaceManager(capacity), MAX_MODEL_LEN)
    tokenizer = byte_tokenizer() if has_tokenizer else None
    return LLMEngine(EngineCore(scheduler, FakeExecutor(next_token, capacity), clock), tokenizer, clock, metrics)
