"""What is compared with a reference: one function a case, which runs the reference and the engine on the same input."""

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from sarathi import LLM, SamplingParams

PROMPT = random.Random(1).choices(range(97), k=100)
GREEDY = SamplingParams(temperature=0.0, max_tokens=6, ignore_eos=True)


class Values(NamedTuple):
    """What the reference says and what the engine says, as they stand in the table."""

    theirs: object
    ours: object


@dataclass(frozen=True)
class Comparison:
    """A row of the table. why: the reason where the two differ, else nothing."""

    what: str
    reference: str
    test: str
    compute: Callable[[Path], Values]
    why: str = ""


COMPARISONS: list[Comparison] = []


def compared(what: str, reference: str, test: str, why: str = "") -> Callable[..., Callable[[Path], Values]]:
    """what: the input. test: path and name, under tests/, of the one that holds it for many inputs."""

    def register(compute: Callable[[Path], Values]) -> Callable[[Path], Values]:
        COMPARISONS.append(Comparison(what, reference, test, compute, why))
        return compute

    return register


def generate(model: Path, prompt: Sequence[int] = PROMPT, params: SamplingParams = GREEDY) -> list[int]:
    """What the engine generates on a CPU."""
    with LLM(str(model), device="cpu", memory_bytes=2**23, max_num_seqs=2) as llm:
        return list(llm.generate([list(prompt)], params, use_tqdm=False)[0].outputs[0].token_ids)


def said(act: Callable[[], object]) -> object:
    """What `act` returns, or that it refuses."""
    try:
        return act()
    except ValueError:
        return "ValueError"


def set_keys(file: Path, **changes: Any) -> None:
    """None removes a key."""
    kept = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({key: value for key, value in kept.items() if value is not None}))
