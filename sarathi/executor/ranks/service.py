"""One rank: receives the same messages as every other rank and runs its share of each step."""

import gc
import pickle
import traceback
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.distributed import TCPStore  # type: ignore[attr-defined]  # stubs lack it

from sarathi.config.schema import EngineConfig
from sarathi.executor.ranks.protocol import Channel, RankFacts, RankSetup, Reply, is_answered
from sarathi.executor.steps import Agree, Steps
from sarathi.messages import Arrival, SampledToken, SchedulerOutput, StepFuture, StepResult
from sarathi.model_executor.parallel.ranks import OneRank, ProcessRanks, Ranks
from sarathi.transfer.link import RECEIVER, SENDER, RankLink
from sarathi.transfer.receiver import Receiver
from sarathi.transfer.sender import Sender
from sarathi.worker.worker import Worker

_MAX_RETAINED_FUTURES = 8  # steps whose results can still be requested


class RankService:
    """The commands of a rank."""

    def __init__(self, setup: RankSetup, agree: Agree) -> None:
        config, ranks = _connect(setup)
        self._number = setup.rank
        self._has_results = setup.rank == setup.grid.result_rank
        self._worker = Worker(config, ranks, setup.make_vocabulary)
        self._steps = Steps(self._worker, agree)
        self._futures: dict[int, StepFuture] = {}
        self._busy_s = 0.0
        gc.collect()
        gc.freeze()

    def facts(self) -> RankFacts:
        worker = self._worker
        return RankFacts(
            worker.capacity, worker.vocab_size, worker.max_model_len, worker.token_bytes, worker.resolution,
            worker.max_in_flight,
        )  # fmt: skip

    def launch(self, number: int, out: SchedulerOutput, tokens: Sequence[SampledToken]) -> None:
        """number: counts launches from 0. tokens: sampled since the last launch, for stages before the last."""
        if not self._worker.model.vocab_size:
            self._worker.append_tokens(tokens)
        self._futures[number] = self._steps.launch(out)
        self._futures.pop(number - _MAX_RETAINED_FUTURES, None)

    def result(self, number: int) -> StepResult | None:
        """Every rank takes the result at the same position in the messages; the last stage's first rank returns it."""
        result = self._futures[number].result()
        self._busy_s += result.model_s
        return result if self._has_results else None

    def wait(self) -> None:
        self._worker.wait()

    def memory_stats(self) -> Any:
        return self._worker.memory_stats()

    def resize_cache(self, rows: int) -> bool:
        return self._worker.resize_cache(rows)

    def drop_weights(self) -> None:
        self._worker.drop_weights()

    def load_weights(self) -> None:
        self._worker.load_weights()

    def check_integrity(self) -> None:
        self._worker.check_integrity()

    def busy_s(self) -> float:
        return self._busy_s

    def fingerprint(self) -> str:
        return self._worker.fingerprint()

    def start_sending(self, store: tuple[str, int]) -> int:
        """Send the portions in each step's `sent` to the same rank of the decode engine. Returns the number of layers.

        store: see RankLink.
        """
        worker = self._worker
        link = RankLink(store, self._number, SENDER, worker.model.place.device)
        worker.sending = Sender(link, worker.cache, worker.model.layers)
        return len(worker.model.layers)

    def start_receiving(self, store: tuple[str, int]) -> None:
        """Start to receive portions from the same rank of the prefill engine."""
        link = RankLink(store, self._number, RECEIVER, self._worker.model.place.device)
        self._receiver = Receiver(link, self._worker.cache)

    def arrive(self, arrivals: Sequence[Arrival]) -> None:
        """Wait until all portions have arrived, then append the first tokens."""
        for request_id, num_portions, token in arrivals:
            self._receiver.wait(request_id, num_portions)
            if token is not None:
                self._worker.append_tokens([token])

    def close(self) -> None:
        """Keeps the process group, which ends with the process: destroying NCCL's would wait for graphs that use it."""
        self._worker.close()


def serve(channel: Channel, setup: RankSetup, agree: Agree) -> None:
    """Build the rank and run commands until "close". An error is sent as a reply and ends the rank."""
    number, method = 0, "facts"
    try:
        service = RankService(setup, agree)
        while method != "close":
            number, method, arguments = pickle.loads(channel.receive())
            value = getattr(service, method)(*arguments)
            if is_answered(method, setup.rank, setup.grid):
                channel.send(pickle.dumps(Reply(number, value)))
    except (EOFError, ConnectionError):
        raise
    except Exception as error:
        channel.send(_failure(number, error))


def _failure(number: int, error: Exception) -> bytes:
    """The error itself if it is the user's (ValueError), else its text."""
    if not isinstance(error, ValueError):
        traceback.print_exc()
        error = RuntimeError(f"{type(error).__name__}: {error}")
    try:
        message = pickle.dumps(Reply(number, error=error))
        pickle.loads(message)
    except Exception:
        message = pickle.dumps(Reply(number, error=ValueError(str(error))))
    return message


def _connect(setup: RankSetup) -> tuple[EngineConfig, Ranks]:
    """Join the process group. Returns the configuration with this rank's device."""
    torch.set_num_threads(setup.num_threads)
    config, device = setup.config, torch.device(setup.device)
    if device.type == "cuda":
        torch.cuda.set_device(device)
    config = replace(config, model=replace(config.model, device=str(device)))
    if setup.grid.size == 1:
        return config, OneRank()
    store = TCPStore(*setup.store, is_master=False)
    return config, ProcessRanks(setup.rank, setup.grid, store, device)
