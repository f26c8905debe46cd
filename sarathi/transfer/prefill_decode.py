"""Prefill on one worker, decode on another (1P1D). A layer's keys and values leave while later layers compute.

The two workers have the same model, the same layout of the cache and the same dtype. A request arrives as 2 ranges
where a region holds all layers, or as 2 a layer, and again for each chunk of its prompt; on blocks as 2 a layer and
block.
"""

from collections.abc import Sequence
from itertools import count
from typing import Any, NamedTuple

from sarathi.core.block_space_manager import BlockSpaceManager
from sarathi.messages import Chunk, NewRequest, SampledToken, SchedulerOutput
from sarathi.request import Request
from sarathi.transfer.link import Link
from sarathi.worker.worker import Worker
from vattention import OutOfMemoryError


class Announcement(NamedTuple):
    """What the decoding side hears before the ranges come. ends: of the prompt's chunks, tokens."""

    request: NewRequest
    ends: tuple[int, ...]


class SendingLayer:
    """A decoder's layer, after which something is told."""

    def __init__(self, layer: Any, index: int, prefiller: "Prefiller") -> None:
        self._layer, self._index, self._prefiller = layer, index, prefiller

    def __call__(self, stream: Any, step: Any, layer: Any) -> None:
        self._layer(stream, step, layer)
        self._prefiller.on_layer(self._index)


class _Side:
    """A worker and the rows that its requests hold."""

    def __init__(self, worker: Worker, block_space_manager: BlockSpaceManager, link: Link) -> None:
        self._worker, self._rows, self._link = worker, block_space_manager, link
        self._step_ids = count()

    def _grant(self, request: Request, num_tokens: int) -> tuple[int, ...]:
        """Blocks for so many tokens in all; () on virtual memory. Raises OutOfMemoryError."""
        grant = self._rows.allocate(request, num_tokens)
        if grant is None:
            capacity = self._rows.capacity
            needed = capacity.rows_for(num_tokens)
            raise OutOfMemoryError(
                f"request {request.request_id!r} needs {needed} rows in all, and {self._rows.num_used_rows} of "
                f"{capacity.rows} are in use", needed, capacity.rows,
            )  # fmt: skip
        return grant.block_ids

    def _prepare(self, new: Sequence[NewRequest], chunk: Chunk) -> SchedulerOutput:
        out = SchedulerOutput(next(self._step_ids), tuple(new), (chunk,))
        if (rows := self._worker.prepare(out)) is not None:
            raise OutOfMemoryError(f"request {chunk.request_id!r}: the cache has {rows} rows", rows + 1, rows)
        return out

    def _forget(self, request: Request) -> None:
        self._worker.prepare(SchedulerOutput(next(self._step_ids), finished=(request.request_id,)))
        self._rows.free(request)


class Prefiller(_Side):
    """Computes prompts and sends their keys and values. Its model must run eagerly: no CUDA graph tells of a layer."""

    def __init__(self, worker: Worker, block_space_manager: BlockSpaceManager, link: Link, chunk_size: int) -> None:
        """chunk_size: tokens of a step."""
        super().__init__(worker, block_space_manager, link)
        self._chunk_size = chunk_size
        self._ranges: Sequence[Sequence[Any]] = ()
        self.num_ranges = 0  # sent so far
        layers: list[Any] = worker.model.layers
        layers[:] = [SendingLayer(layer, index, self) for index, layer in enumerate(layers)]

    def run(self, new: NewRequest) -> SampledToken:
        """Compute a prompt; returns the first token, when everything has left. Raises OutOfMemoryError.

        After another error its memory stays held: what is on its way may still be read.
        """
        request, length = Request(new.request_id, new.token_ids, new.sampling_params), len(new.token_ids)
        blocks = self._grant(request, length)
        ends = (*range(self._chunk_size, length, self._chunk_size), length)
        self._link.send_message(Announcement(new, ends))
        held = None
        try:
            for start, end in zip((0, *ends), ends, strict=False):
                first = not start
                chunk = Chunk(new.request_id, start, end - start, end == length, length, blocks if first else ())
                out = self._prepare([new] if first else [], chunk)
                held = self._worker.cache.hold(new.request_id) if first else held
                self._ranges = self._worker.cache.ranges(new.request_id, start, end)
                result = self._worker.run(out).result()
            self._link.send_message(result.tokens[0])
            self._link.wait()
        finally:
            self._forget(request)
        if held is not None:
            self._worker.cache.let_go(held)
        return result.tokens[0]

    def on_layer(self, index: int) -> None:
        """A layer of the step is computed, or on a GPU submitted."""
        self._link.send(self._ranges[index])
        self.num_ranges += len(self._ranges[index])


class Decoder(_Side):
    """Takes in requests whose prompts another worker computes, and goes on with them."""

    def receive(self) -> NewRequest:
        """The next request: its keys and values and its first token are there on return. Raises OutOfMemoryError."""
        new, ends = self._link.receive_message()
        request, length = Request(new.request_id, new.token_ids, new.sampling_params), len(new.token_ids)
        blocks = self._grant(request, length)
        self._prepare([new], Chunk(new.request_id, 0, length, False, length, blocks))
        for start, end in zip((0, *ends), ends, strict=False):
            for ranges in self._worker.cache.ranges(new.request_id, start, end):
                self._link.receive(ranges)
        token = self._link.receive_message()
        self._link.wait()
        self._worker.append_tokens([token])
        return NewRequest(new.request_id, (*new.token_ids, token.token_id), new.sampling_params, new.eos_token_ids)

    def decode(self, new: NewRequest, num_tokens: int) -> list[int]:
        """So many tokens more of a request that `receive` returned; then it is gone from this worker."""
        request = Request(new.request_id, new.token_ids, new.sampling_params)
        tokens: list[int] = []
        for length in range(len(new.token_ids), len(new.token_ids) + num_tokens):
            blocks = self._grant(request, length)
            out = self._prepare([], Chunk(new.request_id, length - 1, 1, True, length, blocks))
            tokens.append(self._worker.run(out).result().tokens[0].token_id)
        self._forget(request)
        return tokens
