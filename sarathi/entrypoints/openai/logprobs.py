"""Log probabilities in the formats of chat completions, text completions and vLLM's prompt_logprobs."""

from collections.abc import Sequence
from typing import Any

from sarathi.engine.outputs import CompletionOutput, Logprob, RequestOutput, TokenLogprobs
from sarathi.engine.tokenizer.tokenizer import Tokenizer
from sarathi.entrypoints.openai.objects import ChatLogprobs, ChosenLogprob, TextLogprobs, TokenLogprob

_LEAST = -9999.0  # JSON has no infinity


def new_logprobs(output: CompletionOutput, num_old: int) -> list[TokenLogprobs]:
    """The logprobs of a completion's tokens from num_old on; empty unless requested."""
    return (output.logprobs or [])[num_old:]


def chat_logprobs(entries: Sequence[TokenLogprobs], num_top: int, tokenizer: Tokenizer) -> ChatLogprobs:
    """num_top: how many of the most likely tokens to list."""
    return ChatLogprobs([_chosen(entry, num_top, tokenizer) for entry in entries])


def text_logprobs(entries: Sequence[tuple[int, TokenLogprobs | None]], tokenizer: Tokenizer, at: int) -> TextLogprobs:
    """entries: (token id, logprobs). at: number of characters of the choice's text before them."""
    found = TextLogprobs([], [], [], [])
    for token_id, entry in entries:
        text = tokenizer.piece(token_id)
        found.text_offset.append(at)
        found.tokens.append(text)
        found.token_logprobs.append(None if entry is None else _finite(entry[token_id].logprob))
        top = None if entry is None else {each.decoded_token: _finite(each.logprob) for each in entry.values()}
        found.top_logprobs.append(top)
        at += len(text)
    return found


def prompt_entries(output: RequestOutput) -> list[tuple[int, TokenLogprobs | None]]:
    """The prompt's tokens with their logprobs; the first has none."""
    return list(zip(output.prompt_token_ids, output.prompt_logprobs or (), strict=False))


def prompt_logprobs(output: RequestOutput) -> list[Any] | None:
    """vLLM's format: for each prompt token {token id: logprob and text}; null for the first."""
    if output.prompt_logprobs is None:
        return None
    return [entry and {str(key): _named(value) for key, value in entry.items()} for entry in output.prompt_logprobs]


def _named(value: Logprob) -> dict[str, Any]:
    return {"logprob": _finite(value.logprob), "decoded_token": value.decoded_token}


def _chosen(entry: TokenLogprobs, num_top: int, tokenizer: Tokenizer) -> ChosenLogprob:
    token_id = next(iter(entry))
    best = sorted(entry, key=lambda each: -entry[each].logprob)[:num_top]
    top = [TokenLogprob(*_fields(each, entry[each], tokenizer)) for each in best]
    return ChosenLogprob(*_fields(token_id, entry[token_id], tokenizer), top)


def _fields(token_id: int, value: Logprob, tokenizer: Tokenizer) -> tuple[str, float, list[int]]:
    """Text, logprob and bytes. A token with part of a character has U+FFFD in the text."""
    raw = tokenizer.token_bytes(token_id) or value.decoded_token.encode()
    return value.decoded_token, _finite(value.logprob), list(raw)


def _finite(logprob: float) -> float:
    return max(logprob, _LEAST)
