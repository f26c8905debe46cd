"""What many tests share and what takes seconds to make: a server of SmolLM2, and SmolLM2 in transformers."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

import pytest
import torch
from forked_ranks import ForkedRank
from http_server import RunningServer, options, running_server
from small_models import save_tiny_model
from tiny_models import TinyModel, build

from sarathi.executor.ranks import multiproc
from sarathi.executor.ranks.group import RankGroup

if TYPE_CHECKING:
    from transformers import PreTrainedModel


@pytest.fixture(scope="session")
def server() -> Iterator[RunningServer]:
    """Of SmolLM2, with a context of 1024 tokens and prefix caching. A test leaves it without requests."""
    with running_server("smollm2-135m", *options(max_model_len=1024)) as server:
        yield server


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder of a tiny model for long requests."""
    return save_tiny_model(tmp_path_factory.mktemp("models") / "tiny", max_position_embeddings=32768)


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> TinyModel:
    """A Llama 2 of a few layers, for engines and for transformers. A test leaves its folder as it is."""
    return build("llama2", tmp_path_factory.mktemp("llama2"))


@pytest.fixture(scope="module")
def forked_ranks() -> Iterator[None]:
    """Ranks on this machine start as forks and not as interpreters of their own."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(multiproc, "_start_interpreter", ForkedRank)
        yield


@pytest.fixture
def short_silence(monkeypatch: pytest.MonkeyPatch) -> None:
    """A rank counts as hung after 4 s without a sign of life, which it shows ten times a second."""
    monkeypatch.setitem(RankGroup.ask.__kwdefaults__, "silence_s", 4.0)


@pytest.fixture(scope="session")
def reference() -> "PreTrainedModel":
    """SmolLM2 in transformers, float32. One thread: others may share the cores, and a product that is split over a busy
    core is slower than a whole one."""
    from smollm2 import load_reference  # imports transformers

    torch.set_num_threads(1)
    return load_reference()
