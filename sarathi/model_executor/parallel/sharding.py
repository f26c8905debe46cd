"""Tensor parallelism: the shapes and checkpoint ranges of one rank.

Query, key, value, gate and up are split by rows (heads, inner columns), the output projections by columns, embedding
and head by tokens of the vocabulary. Norms are whole on every rank.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

from sarathi.model_executor.architecture import ModelArchitecture


class ShardingError(ValueError):
    """The model cannot be split over this many ranks; the message has the numbers."""


class Shard(NamedTuple):
    """Elements [start, stop) of dimension `dim` of a tensor that has `size` of them in all."""

    dim: int
    start: int
    stop: int
    size: int


@dataclass(frozen=True)
class TensorShare:
    """One rank's share of a model. Raises ShardingError if the ranks do not divide heads or inner columns.

    arch: of the whole model. With fewer KV heads than ranks, several ranks hold the same one.
    """

    arch: ModelArchitecture
    rank: int
    size: int

    def __post_init__(self) -> None:
        arch, size = self.arch, self.size
        divides = {"num_attention_heads": arch.num_heads, "intermediate_size": arch.intermediate_size}
        wrong = [f"{name}={number}" for name, number in divides.items() if number % size]
        if arch.num_kv_heads % size and size % arch.num_kv_heads:
            wrong.append(f"num_key_value_heads={arch.num_kv_heads}")
        if wrong:
            raise ShardingError(
                f"tensor_parallel_size={size}: the model cannot be split over {size} ranks, which do not divide "
                f"{', '.join(wrong)}; possible are {', '.join(map(str, possible_sizes(arch)))}"
            )

    @property
    def architecture(self) -> ModelArchitecture:
        """The shapes of this rank; its vocabulary is rounded up to the same number on every rank."""
        return replace(
            self.arch,
            num_heads=self.arch.num_heads // self.size,
            num_kv_heads=self._kv_heads,
            intermediate_size=self.arch.intermediate_size // self.size,
            vocab_size=self.vocab_rows,
        )

    @property
    def vocab_rows(self) -> int:
        """Rows of this rank's embedding and head; those past the vocabulary are zero."""
        return -(-self.arch.vocab_size // self.size)

    def shards(self) -> Mapping[str, Shard]:
        """This rank's range of each split tensor, by the end of the tensor's name."""
        arch, head = self.arch, self.arch.head_size
        query = self._range(0, arch.num_heads * head, arch.num_heads // self.size * head)
        first_kv = self.rank * arch.num_kv_heads // self.size * head
        kv = Shard(0, first_kv, first_kv + self._kv_heads * head, arch.num_kv_heads * head)
        inner = self._range(0, arch.intermediate_size, arch.intermediate_size // self.size)
        vocab = self._range(0, arch.vocab_size, self.vocab_rows)
        rows = {"q_proj": query, "k_proj": kv, "v_proj": kv, "gate_proj": inner, "up_proj": inner}
        tokens = {"embed_tokens.weight": vocab, "lm_head.weight": vocab}
        columns = {"o_proj.weight": query._replace(dim=1), "down_proj.weight": inner._replace(dim=1)}
        return tokens | columns | {f"{name}.{kind}": shard for name, shard in rows.items() for kind in _KINDS}

    @property
    def _kv_heads(self) -> int:
        return max(1, self.arch.num_kv_heads // self.size)

    def _range(self, dim: int, total: int, per_rank: int) -> Shard:
        start, stop = (min(rank * per_rank, total) for rank in (self.rank, self.rank + 1))
        return Shard(dim, start, stop, total)


_KINDS = ("weight", "bias")


def possible_sizes(arch: ModelArchitecture) -> list[int]:
    """The numbers of ranks over which the model can be split."""
    heads, kv_heads, inner = arch.num_heads, arch.num_kv_heads, arch.intermediate_size
    return [
        size
        for size in range(1, heads + 1)
        if not heads % size and not inner % size and (not kv_heads % size or not size % kv_heads)
    ]


def shard_of(name: str, shards: Mapping[str, Shard]) -> Shard | None:
    """The range that a rank holds of this tensor of a checkpoint; None: all of it."""
    return shards.get(name) or shards.get(".".join(name.split(".")[-2:]))
