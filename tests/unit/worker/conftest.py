"""One thread: tests share their cores with others, and tiny tensors gain nothing from more."""

import pytest
import torch


@pytest.fixture(autouse=True, scope="session")
def one_thread() -> None:
    torch.set_num_threads(1)
