"""The prefill engine's side of a transfer: sends each layer's keys and values while later layers run."""

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from torch import Tensor

from sarathi.messages import Portion
from sarathi.transfer.link import Link
from sarathi.worker.sending import Sending


class Ranges(Protocol):
    """The part of a CacheEngine that a transfer needs."""

    def ranges(self, request_id: str, first: int, end: int) -> list[list[Tensor]]: ...


class SendingLayer:
    """A decoder layer that notifies the sender after it has run."""

    def __init__(self, layer: Any, index: int, sender: "Sender") -> None:
        self._layer, self._index, self._sender = layer, index, sender

    def __call__(self, stream: Any, step: Any, layer: Any) -> None:
        self._layer(stream, step, layer)
        self._sender.on_layer(self._index)

    def parameters(self, prefix: str) -> Iterator[tuple[str, Tensor]]:
        """The layer's parameters, used to reload weights."""
        parameters: Iterator[tuple[str, Tensor]] = self._layer.parameters(prefix)
        return parameters


class Sender(Sending):
    """Sends portions of prompts. The model must run eagerly, since a CUDA graph does not call `on_layer`."""

    def __init__(self, link: Link, cache: Ranges, layers: list[Any]) -> None:
        """layers: see `attach`."""
        self._link, self._cache = link, cache
        self._portions: Sequence[Portion] = ()
        self._ranges: list[list[list[Tensor]]] = []  # of each portion, of each layer
        self._transfers: defaultdict[str, list[Any]] = defaultdict(list)
        self.attach(layers)

    def attach(self, layers: list[Any]) -> None:
        """Wrap the entries of the model's list of layers, in place."""
        layers[:] = [SendingLayer(layer, index, self) for index, layer in enumerate(layers)]

    def start(self, portions: Sequence[Portion]) -> None:
        self._portions = portions
        self._ranges = [self._cache.ranges(*portion) for portion in portions]
        if portions:
            self._link.announce(tuple(portions))

    def on_layer(self, index: int) -> None:
        """Send the portions of a layer that is computed, or on a GPU submitted."""
        for portion, ranges in zip(self._portions, self._ranges, strict=True):
            self._transfers[portion.request_id] += self._link.send(ranges[index])

    def settle(self, request_ids: Iterable[str]) -> None:
        for request_id in request_ids:
            self._link.wait(self._transfers.pop(request_id, ()))
