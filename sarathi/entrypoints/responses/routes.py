"""Routes at /v1/responses: create, retrieve, delete, cancel, list input items."""

import asyncio
from collections.abc import Sequence
from typing import Any

from fastapi import APIRouter, Request, Response

from sarathi.entrypoints.openai.generation import Header, submit
from sarathi.entrypoints.parsing.turn import Turn
from sarathi.entrypoints.responses.generation import Generation
from sarathi.entrypoints.responses.output import OutputStream
from sarathi.entrypoints.responses.protocol import ResponsesRequest
from sarathi.entrypoints.responses.response import new_response
from sarathi.entrypoints.responses.store import ResponseStore, StoredResponse
from sarathi.entrypoints.server.context import ServerContext, context_of
from sarathi.entrypoints.server.errors import APIError, user_errors
from sarathi.entrypoints.server.streaming import EventStream, json_response, until_disconnected

router = APIRouter(tags=["OpenAI"])


class Responses:
    """The responses of one server. running: tasks of background responses, by id."""

    def __init__(self) -> None:
        self.store = ResponseStore()
        self.running: dict[str, asyncio.Task[None]] = {}

    def start(self, generation: Generation) -> None:
        """Generate in the background."""
        name = generation.response["id"]
        self.running[name] = asyncio.create_task(generation.in_background())
        self.running[name].add_done_callback(lambda _: self.running.pop(name, None))

    async def cancel(self, name: str) -> None:
        """Cancel a background response and wait for its end."""
        task = self.running.get(name)
        if task is not None:
            task.cancel()
            await asyncio.wait([task])


@router.post("/v1/responses")
async def create_response(body: ResponsesRequest, request: Request) -> Response:
    """Generate a response, optionally continuing a previous one."""
    context, responses = context_of(request), _responses_of(request)
    header = Header("resp", context.check_model(body.model), f"_{context.id_prefix}")
    history = [*_previous(responses.store, body.previous_response_id), *body.input_items]
    generation = await _submit(context, responses.store, body, header, history)
    if body.background:
        responses.start(generation)
        return json_response(generation.response)
    if body.stream:
        return EventStream(generation.events())
    return json_response(await until_disconnected(request.receive, generation.whole()))


@router.post("/v1/responses/compact", include_in_schema=False)
async def refuse_compaction() -> Response:
    """Status 404, as for any unknown route; the routes of single responses would return 405."""
    raise APIError(404, "this server does not compact conversations: there is no route /v1/responses/compact")


@router.get("/v1/responses/{name}")
async def get_response(name: str, request: Request) -> Response:
    """A stored response."""
    return json_response(_responses_of(request).store.get(name).response)


@router.delete("/v1/responses/{name}")
async def delete_response(name: str, request: Request) -> Response:
    """Delete a response; cancels it if it is running in the background."""
    responses = _responses_of(request)
    responses.store.get(name)
    await responses.cancel(name)
    responses.store.delete(name)
    return json_response({"id": name, "object": "response", "deleted": True})


@router.post("/v1/responses/{name}/cancel")
async def cancel_response(name: str, request: Request) -> Response:
    """Cancel a background response."""
    responses = _responses_of(request)
    stored = responses.store.get(name)
    if not stored.response["background"]:
        raise APIError(400, f"response {name!r} is not a background response: only those can be cancelled")
    await responses.cancel(name)
    return json_response(stored.response)


@router.get("/v1/responses/{name}/input_items")
async def list_input_items(name: str, request: Request) -> Response:
    """The input items of a stored response."""
    items = [
        {"id": f"item_{number}", **item}
        for number, item in enumerate(_responses_of(request).store.get(name).input_items)
    ]
    ends = {"first_id": items[0]["id"], "last_id": items[-1]["id"]} if items else {"first_id": None, "last_id": None}
    return json_response({"object": "list", "data": items, "has_more": False, **ends})


async def _submit(
    context: ServerContext, store: ResponseStore, body: ResponsesRequest, header: Header, history: list[dict[str, Any]]
) -> Generation:
    with user_errors("input", context.max_model_len):
        turn = body.turn(context.model_format, history)
        params = turn.limited(body.sampling_params())
        prompt = await _encode(context, body, turn)
        [outputs] = await submit(context, header, [prompt], params, body.priority)
    stored = StoredResponse(new_response(body, header), body.input_items, history)
    stream = OutputStream(context.model_format.tools.make_id)
    kept = None if body.store is False else store
    return Generation(outputs, turn.parser(context.tokenizer, prompt), stream, stored, kept)


async def _encode(context: ServerContext, body: ResponsesRequest, turn: Turn) -> Sequence[int]:
    return await context.llm.encode_chat(**turn.template_arguments(), **body.template_options(context.model_format))


def _previous(store: ResponseStore, name: str | None) -> list[dict[str, Any]]:
    """The items of the previous response's conversation."""
    if name is None:
        return []
    try:
        return store.get(name).items
    except APIError:
        raise APIError(
            400, f"Previous response with id {name!r} not found.", param="previous_response_id",
            code="previous_response_not_found",
        ) from None  # fmt: skip


def _responses_of(request: Request) -> Responses:
    """The application's responses, created on first use."""
    state = request.app.state
    if not hasattr(state, "responses"):
        state.responses = Responses()
    responses: Responses = state.responses
    return responses
