"""One step's tokens as tensors, in the order of its chunks."""

from dataclasses import dataclass
from itertools import takewhile

from torch import Tensor

from sarathi.messages import Chunk, PrefixGroup


@dataclass(frozen=True, slots=True)
class Batch:
    """T tokens of all chunks, one after the other; integer tensors on the model's device.

    token_ids: [T], placeholder tokens among them where steps overlap.
    positions: [T], of each token in its sequence.
    sample_indices: [S + N], the tokens whose logits are wanted: the last of each chunk that samples, then those before
        prompt tokens whose log probabilities are asked for; None where every token is the last of its chunk.
    rope_lengths: [T], max(tokens of the request's prompt, position + 1), see RopeFrequencies; None where a
        model's frequencies do not depend on it.
    groups: of chunks, see SchedulerOutput.
    """

    chunks: tuple[Chunk, ...]
    token_ids: Tensor
    positions: Tensor
    sample_indices: Tensor | None
    rope_lengths: Tensor | None = None
    groups: tuple[PrefixGroup, ...] = ()

    @property
    def leading_decodes(self) -> int:
        """How many chunks of one token come before the first that has more."""
        return sum(1 for _ in takewhile(lambda chunk: chunk.num_tokens == 1, self.chunks))
