"""Every knob of the HTTP server, and its API keys."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sarathi.config.knobs import ConfigError, Section, knob

_API_KEYS_VARIABLE = "SARATHI_API_KEYS"


@dataclass(frozen=True)
class ServerConfig(Section):
    """Address, names and limits of the HTTP server."""

    host: str = knob("127.0.0.1", "address to listen on; 0.0.0.0 is every interface")
    port: int = knob(8000, "port to listen on; 0 takes a free one", low=0, high=65535)
    served_model_name: str | None = knob(None, "names that clients call the model by, with commas; none: the model's")
    api_keys_file: str | None = knob(
        None, f"file with one API key a line; the variable {_API_KEYS_VARIABLE} holds more, with commas"
    )
    tool_call_parser: str = knob(
        "auto", "how the model writes tool calls; auto: as its chat template shows it",
        choices=("auto", "hermes", "llama3_json", "mistral"),
    )  # fmt: skip
    reasoning_parser: str = knob(
        "auto", "whether text in <think> tags is reasoning; auto: where the chat template has them",
        choices=("auto", "none", "qwen3"),
    )  # fmt: skip
    heartbeat_timeout_s: float = knob(10.0, "silence of the engine's process after which it counts as dead", low=1.0)

    def model_names(self, model: str) -> tuple[str, ...]:
        """The names of the model, the main one first."""
        names = tuple(name.strip() for name in (self.served_model_name or model).split(",") if name.strip())
        if not names:
            raise ConfigError(f"served_model_name is {self.served_model_name!r}: it must hold a name")
        return names

    def api_keys(self) -> tuple[str, ...]:
        """The keys of the file and of the environment; without any, every client may use the server."""
        keys = os.environ.get(_API_KEYS_VARIABLE, "").split(",")
        if self.api_keys_file is not None:
            try:
                keys += Path(self.api_keys_file).expanduser().read_text(encoding="utf-8").splitlines()
            except (OSError, UnicodeDecodeError) as error:
                raise ConfigError(f"cannot read api_keys_file {self.api_keys_file!r}: {error}") from None
        return tuple(key.strip() for key in keys if key.strip())
