"""The web page at /: a chat beside charts of the KV cache and latencies, and the statistics behind them."""

from functools import cache
from importlib.resources import files
from typing import Any

from fastapi import APIRouter, Request, Response

from sarathi.entrypoints.server.context import context_of

router = APIRouter(tags=["server"])
_POLICY = (
    "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; connect-src 'self'; base-uri 'none'"
)


@router.get("/", include_in_schema=False)
async def get_page() -> Response:
    """One self-contained file; its content security policy allows connections to this server only."""
    headers = {"Content-Security-Policy": _POLICY, "X-Frame-Options": "DENY"}
    return Response(_page(), media_type="text/html; charset=utf-8", headers=headers)


@router.get("/stats")
async def get_stats(request: Request) -> dict[str, Any]:
    """Current queues and memory. A row is a page at the same offset of every region, or a block.

    retained: rows of finished requests kept as cached prefixes. pooled: mapped rows of no request.
    """
    context = context_of(request)
    stats, facts = await context.llm.stats(), context.llm.facts
    row_bytes = facts.token_bytes * facts.capacity.page_bytes // facts.capacity.token_bytes
    return {
        "model": context.model_name,
        "running": stats.num_running,
        "waiting": stats.num_waiting,
        "used_rows": stats.used_rows,
        "retained_rows": stats.prefixes.num_retained_rows,
        "pooled_rows": stats.memory.idle_bytes // row_bytes,
        "total_rows": stats.total_rows,
        "created_bytes": stats.memory.created_bytes,
        "mapped_bytes": stats.memory.mapped_bytes,
        "pooled_bytes": stats.memory.idle_bytes,
    }


@cache
def _page() -> bytes:
    return (files(__package__) / "page.html").read_bytes()
