"""A conversation over a fake model: what the model gets to read, turn by turn."""

from collections.abc import Sequence

import pytest
from fake_engine import END, make_engine

from sarathi.entrypoints.chat.conversation import Conversation
from sarathi.entrypoints.chat.local import LocalModel
from sarathi.entrypoints.llm import LLM
from sarathi.sampling_params import SamplingParams


class Listener:
    """A model that answers "ok" and remembers what it was asked."""

    def __init__(self) -> None:
        self.heard: list[str] = []

    def __call__(self, tokens: Sequence[int], params: SamplingParams) -> int:
        text = bytes(tokens).decode()
        if text.endswith("assistant:"):
            self.heard.append(text)
        return {"o": ord("k"), "k": END}.get(text[-1], ord("o"))


def talk(*lines: str, system: str | None = None) -> list[str]:
    listener = Listener()
    llm = LLM.from_engine(make_engine(listener))
    conversation = Conversation(LocalModel(llm, SamplingParams(max_tokens=5)), system)
    for line in lines:
        conversation.handle_line(line)
    return listener.heard


def test_the_model_reads_the_whole_conversation() -> None:
    assert talk("hi", "more") == ["user: hi\nassistant:", "user: hi\nassistant: ok\nuser: more\nassistant:"]


def test_a_system_message_comes_first_and_survives_a_reset() -> None:
    assert talk("a", "/reset", "b", system="be kind")[1] == "system: be kind\nuser: b\nassistant:"
    assert talk("a", "/system be brief", "b")[1] == "system: be brief\nuser: b\nassistant:"
    assert talk("/system x", "/system", "b") == ["user: b\nassistant:"]


def test_what_is_refused_is_forgotten(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("hi", "x" * 300, "more")[1] == "user: hi\nassistant: ok\nuser: more\nassistant:"
    assert "longest sequence is 200" in capsys.readouterr().err


def test_empty_lines_and_unknown_commands_reach_no_model(capsys: pytest.CaptureFixture[str]) -> None:
    assert talk("", "/help") == []
    assert "/reset" in capsys.readouterr().out


def test_each_answer_is_followed_by_its_measures(capsys: pytest.CaptureFixture[str]) -> None:
    talk("hi")
    answer, measures = capsys.readouterr().out.splitlines()
    assert answer == "ok"
    assert measures.startswith("[3 tokens, ") and measures.endswith("of KV cache mapped]")
