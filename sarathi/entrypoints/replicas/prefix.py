"""Routing of a request: its prompt's prefix, from the body without a tokenizer, and the replica that owns it."""

import msgspec

BLOCK_BYTES = 512
MAX_BLOCKS = 256
_RESPONSES = "/v1/responses"
_NONE = msgspec.Raw(b"")


class _PromptFields(msgspec.Struct):
    """The prompt fields of all APIs as raw JSON, in the order in which chat templates render them."""

    cache_salt: msgspec.Raw = _NONE
    tools: msgspec.Raw = _NONE
    system: msgspec.Raw = _NONE
    instructions: msgspec.Raw = _NONE
    messages: msgspec.Raw = _NONE
    prompt: msgspec.Raw = _NONE
    input: msgspec.Raw = _NONE
    previous_response_id: msgspec.Raw = _NONE


_decode = msgspec.json.Decoder(_PromptFields).decode


def routing_of(path: str, body: bytes) -> tuple[tuple[int, ...], str]:
    """Prefix and owner of a request, see `ForwardedRequest`. An invalid body has neither."""
    try:
        fields = _decode(body)
    except msgspec.MsgspecError:
        return (), owner_of_response(_last_part(path))
    text = b"".join(bytes(getattr(fields, name)) for name in fields.__struct_fields__)
    previous = bytes(fields.previous_response_id).strip(b'"').decode(errors="replace")
    return prompt_prefix(text), owner_of_response(_last_part(path) or previous)


def prompt_prefix(text: bytes) -> tuple[int, ...]:
    """For each block of the text, a hash of it and everything before it; valid within this process."""
    hashes, last = [], 0
    for start in range(0, min(len(text) // BLOCK_BYTES, MAX_BLOCKS) * BLOCK_BYTES, BLOCK_BYTES):
        last = hash((last, text[start : start + BLOCK_BYTES]))
        hashes.append(last)
    return tuple(hashes)


def response_prefix(replica: str) -> str:
    """The id prefix of the responses that a replica stores."""
    return f"{replica}-"


def owner_of_response(name: str) -> str:
    """The replica named in a response id; "" if none."""
    head, mark, _ = name.partition("-")
    return head.removeprefix("resp_") if mark and head.startswith("resp_") else ""


def _last_part(path: str) -> str:
    """The id in /v1/responses/ID and in the routes below it."""
    return path[len(_RESPONSES) + 1 :].partition("/")[0] if path.startswith(_RESPONSES + "/") else ""
