"""Every knob of the HTTP server, and its API keys."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sarathi.config.knobs import ConfigError, Section, knob

API_KEYS_VARIABLE, ADMIN_KEYS_VARIABLE = "SARATHI_API_KEYS", "SARATHI_ADMIN_KEYS"


@dataclass(frozen=True)
class ServerConfig(Section):
    """Address, names and limits of the HTTP server."""

    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = knob(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: str | None = knob(None, "names that clients call the model by, with commas; none: the model's")
    api_keys_file: str | None = knob(
        None, f"file with one API key a line; the variable {API_KEYS_VARIABLE} holds more, with commas"
    )
    tool_call_parser: str = knob(
        "auto", "how the model writes tool calls; auto: as its chat template shows it",
        choices=("auto", "hermes", "llama3_json", "mistral"),
    )  # fmt: skip
    reasoning_parser: str = knob(
        "auto", "whether text in <think> tags is reasoning; auto: where the chat template has them",
        choices=("auto", "none", "qwen3"),
    )  # fmt: skip
    max_waiting_requests: int | None = knob(
        4096, "requests that may wait for their first step; more are refused with status 429", low=1
    )
    max_waiting_tokens: int | None = knob(
        None, "tokens of the prompts that may wait; more are refused with status 429", low=1
    )
    max_connections: int = knob(4096, "open connections; more are refused with status 503", low=1)
    max_body_bytes: int = knob(2**24, "size of a request; more is refused with status 413", low=1, unit="bytes")
    receive_timeout_s: float = knob(30.0, "seconds that a client may take to send its request", low=0.1)
    send_timeout_s: float = knob(60.0, "seconds that a client may leave its answer unread", low=1)
    request_timeout_s: float | None = knob(None, "seconds that a request may take from its arrival to its end", low=0.1)
    shutdown_timeout_s: float = knob(30.0, "seconds that requests have to end after SIGTERM", low=0.0)
    log_interval_s: float | None = knob(10.0, "seconds between two lines about the load; none: no lines", low=0.1)
    log_requests: bool = knob(False, "write a JSON object to standard error for each request that ends")
    log_texts: bool = knob(False, "log_requests: with the texts of prompts and answers")
    allowed_origins: str | None = knob(None, "origins whose web pages may use the server, with commas; *: all")
    heartbeat_timeout_s: float = knob(10.0, "silence of the engine's process after which it counts as dead", low=1.0)

    def model_names(self, model: str) -> tuple[str, ...]:
        """The names of the model, the main one first."""
        names = tuple(name.strip() for name in (self.served_model_name or model).split(",") if name.strip())
        if not names:
            raise ConfigError(f"served_model_name is {self.served_model_name!r}: it must hold a name")
        return names

    def origins(self) -> tuple[str, ...]:
        """Origins of allowed_origins."""
        return tuple(each.strip() for each in (self.allowed_origins or "").split(",") if each.strip())

    def api_keys(self) -> tuple[str, ...]:
        """The keys of the file and of the environment; without any, every client may use the server."""
        keys = os.environ.get(API_KEYS_VARIABLE, "").split(",")
        if self.api_keys_file is not None:
            try:
                keys += Path(self.api_keys_file).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read api_keys_file {self.api_keys_file!r}: {error}") from None
        return tuple(key.strip() for key in keys if key.strip())

    def admin_keys(self) -> tuple[str, ...]:
        """The keys of the environment that allow what changes the server; without any, nobody may."""
        keys = os.environ.get(ADMIN_KEYS_VARIABLE, "").split(",")
        return tuple(key.strip() for key in keys if key.strip())
