"""What many tests share and what takes seconds to make: a server of SmolLM2, and SmolLM2 in transformers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from http_server import RunningServer, options, running_server
from small_models import save_tiny_model

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Of SmolLM2, with a context of 1024 tokens. A test leaves it without requests."""
    with running_server("smollm2-135m", *options(max_model_len=1024)) as server:
        yield server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny model for long requests."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32768)


@pytest.fixture(scope="session")
def reference() -> "PreTrainedModel":
    """SmolLM2 in transformers, float32. One thread: others may share the cores, and a product that is split over a busy
    core is slower than a whole one."""
    from smollm2 import load_reference  # imports transformers

    torch.set_num_threads(1)
    return load_reference()
