"""Parse command-line words into a configuration. All of these name the same knob or set a switch:

--model.attention_backend fa_vattn    full path
--model_attention_backend fa_vattn    path with underscores
--attention_backend=FA_VATTN          last part, if unique
--write_metrics                       a switch without a value is true
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

from sarathi.benchmark.config.schema import BenchmarkConfig
from sarathi.benchmark.config.selection import without_effect
from sarathi.config.knobs import ConfigError
from sarathi.config.load import find_knob, load_config

CONFIG_FLAG = "config"
logger = logging.getLogger(__name__)


def parse_options(words: Sequence[str]) -> BenchmarkConfig:
    """The configuration of `--config FILE` with overrides. ConfigError names an unknown knob and the nearest known one.

    Logs a warning for a knob on the command line that the selected providers do not read.
    """
    settings = read_settings(words)
    path = settings.pop(CONFIG_FLAG, None)
    config = load_config(BenchmarkConfig, path, settings)
    for sentence in without_effect(config, canonical(settings)):
        logger.warning("%s", sentence)
    return config


def read_settings(words: Sequence[str], switches: Sequence[str] = (), lists: Sequence[str] = ()) -> dict[str, str]:
    """Option names and values as written. A name without a value must be a switch and means true.

    switches: further switches that are not knobs. lists: options that take several words, joined with commas.
    """
    settings: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"unexpected argument {word!r}: write --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            has_value = left and not left[0].startswith("--")
            value = left.pop(0) if has_value else "true" if name in switches else _alone(name)
        while name.replace("-", "_").endswith(tuple(lists)) and left and not left[0].startswith("--"):
            value += "," + left.pop(0)
        settings[name] = value
    return settings


def _alone(name: str) -> str:
    """The value of an option without one: true for a switch, else ConfigError."""
    if name == CONFIG_FLAG or find_knob(BenchmarkConfig, name).value_type is not bool:
        raise ConfigError(f"--{name} needs a value")
    return "true"


def as_words(settings: Mapping[str, object]) -> list[str]:
    """Settings as command-line words for parse_options."""
    return [word for name, value in settings.items() for word in (f"--{name}", "none" if value is None else str(value))]


def start_logging(config: BenchmarkConfig) -> None:
    """Log to standard error at the configured level."""
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")


def canonical(settings: Mapping[str, object]) -> dict[str, object]:
    """The settings by full path, with converted values. ConfigError if one is invalid."""
    found = ((find_knob(BenchmarkConfig, name), value) for name, value in settings.items())
    return {each.path: each.coerce(value) for each, value in found}
