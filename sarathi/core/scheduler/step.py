"""The bookkeeping of one request in a scheduler, and one step while it is being put together. Knows no policy."""

from __future__ import annotations

from dataclasses import dataclass, field

from sarathi.messages import Chunk, NewRequest, SchedulerOutput
from sarathi.request import Request


@dataclass(eq=False, slots=True)
class Ticket:
    """What a scheduler knows of a request beyond the request itself.

    place: its number in the order of arrival; the lower goes first.
    max_output_tokens: output length at which it ends.
    stop_token_ids: tokens that may end it, the model's own end tokens among them.
    granted_tokens: length for which the ledger holds memory.
    steps_in_flight: steps scheduled with it and not yet updated; its memory is in use until they are.
    last_step_id: the last step that took it, or that must go without it.
    is_known: whether the worker has been told of it.
    """

    request: Request
    place: int
    max_output_tokens: int
    stop_token_ids: frozenset[int]
    granted_tokens: int = 0
    steps_in_flight: int = 0
    last_step_id: int = -1
    is_known: bool = False

    def may_end_with(self, token_id: int) -> bool:
        """Whether end_with is worth asking: for nearly every token it is not."""
        return token_id in self.stop_token_ids or len(self.request.output_token_ids) >= self.max_output_tokens

    def end_with(self, token_id: int) -> tuple[str, int | None] | None:
        """(finish reason, stop reason) if the output ends with this token, its newest; None if it goes on."""
        request = self.request
        num_output = len(request.output_token_ids)
        if token_id in self.stop_token_ids and num_output > request.sampling_params.min_tokens:
            is_eos = token_id in request.eos_token_ids and not request.sampling_params.ignore_eos
            return "stop", None if is_eos else token_id
        return ("length", None) if num_output >= self.max_output_tokens else None


@dataclass(slots=True)
class Step:
    """A step being put together, and kept until its result is in.

    num_prompt_tokens: tokens of chunks longer than one. num_partial: chunks that leave some of their prompt for later.
    is_starved: memory ran out and nobody could be preempted at once. is_void: rolled back, its result means nothing.
    finished: requests whose end it tells the worker. num_used_rows: in use by all requests while it runs.
    """

    step_id: int
    chunks: list[Chunk] = field(default_factory=list)
    tickets: list[Ticket] = field(default_factory=list)
    new_requests: list[NewRequest] = field(default_factory=list)
    preempted: list[Ticket] = field(default_factory=list)
    num_tokens: int = 0
    num_prompt_tokens: int = 0
    num_partial: int = 0
    is_starved: bool = False
    is_void: bool = False
    finished: tuple[str, ...] = ()
    num_used_rows: int = 0

    @property
    def num_samples(self) -> int:
        """Tokens that come of this step."""
        return len(self.chunks) - self.num_partial

    def add(self, ticket: Ticket, length: int, samples: bool, block_ids: tuple[int, ...]) -> None:
        """Take the next `length` tokens of a request, and count them as computed from now on."""
        request = ticket.request
        start = request.num_computed_tokens
        self.chunks.append(Chunk(request.request_id, start, length, samples, ticket.granted_tokens, block_ids))
        self.tickets.append(ticket)
        self.num_tokens += length
        if length > 1:
            self.num_prompt_tokens += length
        request.num_computed_tokens = start + length
        if samples:
            request.num_pending_tokens += 1
        else:
            self.num_partial += 1
        ticket.steps_in_flight += 1
        ticket.last_step_id = self.step_id

    def introduce(self, request: Request) -> None:
        """Tell the worker of a request that it has not seen."""
        tokens = request.all_token_ids
        known = NewRequest(request.request_id, tokens, request.sampling_params, request.eos_token_ids)
        self.new_requests.append(known)

    def roll_back(self) -> None:
        """Undo the progress of all chunks; for several steps, the newest first."""
        self.is_void = True
        for ticket, chunk in zip(self.tickets, self.chunks, strict=True):
            if not ticket.request.is_finished:
                ticket.request.num_computed_tokens = chunk.start
                ticket.request.num_pending_tokens -= chunk.samples

    def output(self, num_recoveries: int) -> SchedulerOutput:
        """The message to the worker."""
        preempted = tuple([ticket.request.request_id for ticket in self.preempted])
        new, chunks = tuple(self.new_requests), tuple(self.chunks)
        return SchedulerOutput(self.step_id, new, chunks, preempted, self.finished, num_recoveries)
