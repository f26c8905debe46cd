"""A chat model in this process."""

from collections.abc import Generator, Iterator
from contextlib import contextmanager

from sarathi.config.schema import EngineConfig
from sarathi.entrypoints.chat.conversation import Messages, Piece
from sarathi.entrypoints.console import format_size
from sarathi.entrypoints.llm import LLM
from sarathi.sampling_params import SamplingParams


@contextmanager
def open_local_model(config: EngineConfig, params: SamplingParams) -> "Iterator[LocalModel]":
    """Load the model; free it at the end of the block."""
    with LLM.from_config(config) as llm:
        yield LocalModel(llm, params)


class LocalModel:
    """A ChatModel over an LLM."""

    def __init__(self, llm: LLM, params: SamplingParams) -> None:
        self._llm = llm
        self._params = params

    def __str__(self) -> str:
        return repr(self._llm)

    def answer(self, messages: Messages) -> Generator[Piece, None, None]:
        for output in self._llm.stream(self._llm.encode_chat(messages), self._params):
            yield Piece(output.outputs[0].delta, output.outputs[0].num_tokens)

    def memory(self) -> str:
        return f", {format_size(self._llm.memory_stats().mapped_bytes)} of KV cache mapped"
