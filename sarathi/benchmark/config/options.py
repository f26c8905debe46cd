"""From the words of a command line to a configuration.

--model.attention_backend fa_vattn    the path
--model_attention_backend fa_vattn    the path in one word
--attention_backend=FA_VATTN          the last part, where only one knob ends so
--write_metrics                       a switch alone is true
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
    """The configuration that `--config FILE` and overrides give. ConfigError names an unknown knob and the nearest.

    A knob on the command line that the selected providers do not read is told as a warning.
    """
    settings = read_settings(words)
    path = settings.pop(CONFIG_FLAG, None)
    config = load_config(BenchmarkConfig, path, settings)
    for sentence in without_effect(config, canonical(settings)):
        logger.warning("%s", sentence)
    return config


def read_settings(words: Sequence[str], switches: Sequence[str] = (), lists: Sequence[str] = ()) -> dict[str, str]:
    """Names and values as they were written; a name without a value must be a switch, and is true.

    switches: names that are none of a knob. lists: names that take several words, which are joined with commas.
    """
    settings: dict[str, str] = {}
    left = list(words)
    while left:
        word = left.pop(0)
        if not word.startswith("--") or len(word) < 3:
            raise ConfigError(f"{word!r} stands where the name of a knob should: write --name value")
        name, equals, value = word[2:].partition("=")
        if not equals:
            has_value = left and not left[0].startswith("--")
            value = left.pop(0) if has_value else "true" if name in switches else _alone(name)
        while name.replace("-", "_").endswith(tuple(lists)) and left and not left[0].startswith("--"):
            value += "," + left.pop(0)
        settings[name] = value
    return settings


def _alone(name: str) -> str:
    """What a name without a value means; ConfigError for one that is no switch."""
    if name == CONFIG_FLAG or find_knob(BenchmarkConfig, name).value_type is not bool:
        raise ConfigError(f"--{name} needs a value")
    return "true"


def as_words(settings: Mapping[str, object]) -> list[str]:
    """Settings as a command line that parse_options reads back."""
    return [word for name, value in settings.items() for word in (f"--{name}", "none" if value is None else str(value))]


def start_logging(config: BenchmarkConfig) -> None:
    """To standard error, from the level that the configuration names on."""
    logging.basicConfig(level=config.log_level.upper(), format="%(levelname)s %(name)s: %(message)s")


def canonical(settings: Mapping[str, object]) -> dict[str, object]:
    """The same settings by whole paths, values as the knobs hold them; ConfigError names what is wrong."""
    found = ((find_knob(BenchmarkConfig, name), value) for name, value in settings.items())
    return {each.path: each.coerce(value) for each, value in found}
