"""POST /tokenize and /detokenize, compatible with vLLM."""

from typing import Any

from fastapi import APIRouter, Request

from sarathi.entrypoints.openai.protocol import DetokenizeRequest, TokenizeRequest
from sarathi.entrypoints.parsing.tools import read_choice, read_tools
from sarathi.entrypoints.parsing.turn import Turn
from sarathi.entrypoints.server.context import ServerContext, context_of
from sarathi.entrypoints.server.errors import APIError, user_errors

router = APIRouter(tags=["vLLM"])


@router.post("/tokenize")
async def tokenize(body: TokenizeRequest, request: Request) -> dict[str, Any]:
    """Token ids of a text, or of a conversation in the model's chat format."""
    context = context_of(request)
    context.check_model(body.model)
    with user_errors("prompt", context.max_model_len):
        token_ids = await _token_ids(context, body)
    texts = [context.tokenizer.piece(token_id) for token_id in token_ids] if body.return_token_strs else None
    return {
        "count": len(token_ids),
        "max_model_len": context.max_model_len,
        "tokens": token_ids,
        "token_strs": texts,
    }


@router.post("/detokenize")
async def detokenize(body: DetokenizeRequest, request: Request) -> dict[str, str]:
    """Text of token ids, special tokens included."""
    context = context_of(request)
    context.check_model(body.model)
    vocab_size = context.llm.facts.vocab_size
    if wrong := [token_id for token_id in body.tokens if not 0 <= token_id < vocab_size]:
        message = f"tokens holds {wrong[0]}: each must be from 0 to {vocab_size - 1}"
        raise APIError(400, message, param="tokens")
    text = await context.llm.in_thread(context.tokenizer.decode, body.tokens, skip_special_tokens=False)
    return {"prompt": text}


async def _token_ids(context: ServerContext, body: TokenizeRequest) -> list[int]:
    if body.messages is not None:
        tools = read_tools(body.tools)
        turn = Turn(context.model_format, body.messages, tools, read_choice(None, tools))
        return await context.llm.encode_chat(**turn.template_arguments(), **body.template_options())
    return await context.llm.in_thread(context.tokenizer.encode, body.prompt, body.add_special_tokens)
