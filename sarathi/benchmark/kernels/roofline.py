"""Matrix products and attention of a step, back to back: an upper bound on the engine's speed.

Norms, rope, activations, sampling and scheduling are left out. Each matrix and the attention use the fastest available
kernel, as measured at the step's shapes.
"""

from collections.abc import Callable, Mapping, Sequence
from itertools import pairwise

import torch
from torch import Tensor
from torch.nn import functional

from sarathi.benchmark.kernels.attention import Attend, Equal, Layer, available_attention
from sarathi.benchmark.kernels.shapes import Model
from sarathi.benchmark.kernels.timing import Sample, eager_sample, eager_us, graph_sample, graph_us

Product = Callable[[Tensor, Tensor], Tensor]  # x [tokens, in], weight [out, in] -> [tokens, out]
LAYER = ("qkv", "o", "gate_up", "down")


class Roofline:
    """A model's matrix products and attention, with random weights."""

    def __init__(self, model: Model, device: torch.device, dtype: torch.dtype) -> None:
        self.model, self.device, self.dtype = model, device, dtype
        shapes = model.weights
        self.layers = [{name: self._random(*shapes[name]) for name in LAYER} for _ in range(model.layers)]
        self.head = self._random(*shapes["lm_head"])
        self._products = _products(device)

    def decode(self, batch: int, context: int) -> Sample:
        """The kernels of a decode step of `batch` sequences of `context` tokens, in one graph."""
        model = self.model
        inputs = self._inputs(batch)
        best = {name: self._fastest(name, inputs[name]) for name in model.weights}
        caches = [self._cache(batch, context) for _ in range(model.layers)]
        q = self._queries(batch)
        attend = self._fastest_attention(q, Equal(batch, 1, context, context), caches)

        def run(_: int) -> None:
            for weights, cache in zip(self.layers, caches, strict=True):
                self._layer(weights, best, inputs, lambda cache=cache: attend(q, cache))
            best["lm_head"](inputs["lm_head"], self.head)

        return graph_sample(run, 1, min_launches=1)

    def prefill(self, context: int, chunk: int) -> Sample:
        """The kernels of one prompt's prefill, `chunk` tokens per step, launched as in a run."""
        model = self.model
        cache = self._cache(1, context)
        ends = [*range(chunk, context, chunk), context]
        steps = [Equal(1, end - start, end, context) for start, end in pairwise([0, *ends])]
        sizes = {step.new for step in steps}
        queries = {size: self._queries(size) for size in sizes}
        inputs = {size: self._inputs(size) for size in sizes}
        kernels = [(step.new, self._fastest_attention(queries[step.new], step, [cache])) for step in steps]
        best, last = dict.fromkeys(LAYER, functional.linear), self._random(1, model.hidden)

        def run(_: int) -> None:
            for size, attend in kernels:
                for weights in self.layers:
                    self._layer(weights, best, inputs[size], lambda q=queries[size], a=attend: a(q, cache))
            functional.linear(last, self.head)

        return eager_sample(run, 1)

    def _layer(
        self, weights: Mapping[str, Tensor], best: Mapping[str, Product], inputs: Mapping[str, Tensor],
        attend: Callable[[], Tensor],
    ) -> None:  # fmt: skip
        best["qkv"](inputs["qkv"], weights["qkv"])
        attend()
        for name in LAYER[1:]:
            best[name](inputs[name], weights[name])

    def _fastest(self, name: str, x: Tensor) -> Product:
        """The fastest product for this matrix, measured on the layers' weights."""
        weights = [self.head] if name == "lm_head" else [layer[name] for layer in self.layers]

        def microseconds(product: Product) -> float:
            return graph_us(lambda i: product(x, weights[i]), len(weights), replays=3)

        return min(self._products, key=microseconds)

    def _fastest_attention(self, q: Tensor, shape: Equal, caches: Sequence[Layer]) -> Attend:
        kernels = list(available_attention(self.model, shape))
        if len(kernels) == 1:
            return kernels[0]
        return min(kernels, key=lambda attend: self._attention_us(attend, q, caches))

    @staticmethod
    def _attention_us(attend: Attend, q: Tensor, caches: Sequence[Layer]) -> float:
        if len(caches) == 1:
            return eager_us(lambda _: attend(q, caches[0]), 1, replays=1)
        return graph_us(lambda i: attend(q, caches[i]), len(caches), replays=3)

    def _inputs(self, tokens: int) -> dict[str, Tensor]:
        return {name: self._random(tokens, shape[1]) for name, shape in self.model.weights.items()}

    def _queries(self, tokens: int) -> Tensor:
        return self._random(tokens, self.model.num_heads, self.model.head_size)

    def _cache(self, batch: int, context: int) -> Layer:
        shape = (batch, context, self.model.num_kv_heads, self.model.head_size)
        return self._random(*shape), self._random(*shape)

    def _random(self, *shape: int) -> Tensor:
        return torch.empty(shape, dtype=self.dtype, device=self.device).normal_(0, 0.02)


def _products(device: torch.device) -> list[Product]:
    """cuBLAS, and our kernels for few tokens."""
    if device.type == "cpu":
        return [functional.linear]
    from sarathi.model_executor.ops import overlaps_launches
    from sarathi.model_executor.ops.triton.linear import LinearKernels

    sms = torch.cuda.get_device_properties(device).multi_processor_count
    return [functional.linear, LinearKernels(sms, device, pdl=overlaps_launches(device)).linear]
