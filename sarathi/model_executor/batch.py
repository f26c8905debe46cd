"""One step's tokens as tensors, in the order of its chunks; knows no queues and not where K and V are kept."""

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from sarathi.messages import Chunk


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one after the other; tensors lie on the model's device.

    token_ids, positions: [T] int64.
    sampled_rows: [S] int64, the last row of each chunk that samples; None where every row is one.
    rope_lengths: [T] int64, max(tokens of the request's prompt, position + 1), see RopeFrequencies; None where a
        model's frequencies do not depend on it.
    """

    chunks: tuple[Chunk, ...]
    token_ids: Tensor
    positions: Tensor
    sampled_rows: Tensor | None
    rope_lengths: Tensor | None = None

    @property
    def leading_decodes(self) -> int:
        """How many chunks of one token stand before the first that has more."""
        return sum(1 for _ in takewhile(lambda chunk: chunk.num_tokens == 1, self.chunks))
