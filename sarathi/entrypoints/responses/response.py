"""The response object."""

import time
from collections.abc import Mapping
from typing import Any

from sarathi.engine.outputs import RequestOutput
from sarathi.entrypoints.openai.generation import Header
from sarathi.entrypoints.responses.output import IN_PROGRESS, INCOMPLETE
from sarathi.entrypoints.responses.protocol import ResponsesRequest
from sarathi.entrypoints.server.errors import as_api_error
from sarathi.sampling_params import SamplingParams

_DEFAULTS = SamplingParams()


def new_response(body: ResponsesRequest, header: Header) -> dict[str, Any]:
    """A response without output that repeats the request's settings."""
    reasoning = body.reasoning or {}
    return {
        "id": header.id, "object": "response", "created_at": header.created, "completed_at": None,
        "status": IN_PROGRESS, "incomplete_details": None, "error": None, "model": header.model, "output": [],
        "previous_response_id": body.previous_response_id, "instructions": body.instructions,
        "tools": [_shown_tool(tool) for tool in body.tools or ()], "tool_choice": body.tool_choice or "auto",
        "parallel_tool_calls": body.parallel_tool_calls is not False, "max_tool_calls": body.max_tool_calls,
        "text": {"format": {"type": "text"}, **(body.text or {})},
        "reasoning": {"effort": reasoning.get("effort"), "summary": reasoning.get("summary")},
        "temperature": _number(body.temperature, _DEFAULTS.temperature), "top_p": _number(body.top_p, _DEFAULTS.top_p),
        "presence_penalty": _number(body.presence_penalty, 0), "frequency_penalty": _number(body.frequency_penalty, 0),
        "top_logprobs": 0, "max_output_tokens": body.max_output_tokens, "truncation": "disabled", "usage": None,
        "store": body.store is not False, "background": bool(body.background), "service_tier": "default",
        "metadata": body.metadata or {}, "safety_identifier": body.safety_identifier,
        "prompt_cache_key": body.prompt_cache_key,
    }  # fmt: skip


def finish(response: dict[str, Any], items: list[dict[str, Any]], output: RequestOutput, status: str) -> None:
    """Fill in items, status and usage. output: the last one."""
    num_input, num_output = len(output.prompt_token_ids), output.outputs[0].num_tokens
    response["output"], response["status"], response["completed_at"] = items, status, int(time.time())
    response["usage"] = {
        "input_tokens": num_input, "output_tokens": num_output, "total_tokens": num_input + num_output,
        "input_tokens_details": {"cached_tokens": output.num_cached_tokens},
        "output_tokens_details": {"reasoning_tokens": 0},
    }  # fmt: skip
    if status == INCOMPLETE:
        response["incomplete_details"] = {"reason": "max_output_tokens"}


def fail(response: dict[str, Any], error: Exception) -> None:
    """Fill in the error."""
    told = as_api_error(error)
    response["status"], response["error"] = "failed", {"code": told.code or told.type, "message": told.message}


def _shown_tool(tool: Mapping[str, Any]) -> dict[str, Any]:
    names = ("type", "name", "description", "parameters", "strict")
    return {name: tool.get(name) for name in names}


def _number(given: float | None, default: float) -> float:
    return default if given is None else given
