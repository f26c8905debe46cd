"""A grid of runs, read from YAML.

output_dir: experiments/e2e_static_eval
table: makespan                          # one of tables.TABLES
base: {knob: value, ...}                 # of all runs
grid:
  model.name: [yi-6b-200k, llama-3-8b]   # an axis named by its knob: values
  context:                               # an axis of any name: labels, each with the knobs it sets
    32k: {model.max_model_len: 32768, ...}
test: {base: {...}, grid: {...}}         # knobs and axes that --test overrides; results go
                                           # to results/test
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from sarathi.benchmark.config.options import canonical
from sarathi.benchmark.experiment.tables import TABLES
from sarathi.config.knobs import ConfigError
from sarathi.config.load import read_yaml
from sarathi.config.units import nearest
from sarathi.metrics.files import is_file_name
from sarathi.wording import short_repr

KEYS = ("output_dir", "table", "base", "grid", "test")
_ALLOWED = {"output_dir": "it must be a folder's name", "table": f"it must be one of {', '.join(TABLES)}"}
Axis = Mapping[str, Mapping[str, object]]


@dataclass(frozen=True)
class Run:
    """name: of its folder. settings: knobs by full path."""

    name: str
    settings: Mapping[str, object]


@dataclass(frozen=True)
class Experiment:
    """grid: axis -> label -> knobs. Runs are all combinations; the last axis varies fastest."""

    output_dir: str
    table: str
    base: Mapping[str, object]
    grid: Mapping[str, Axis]

    def runs(self) -> list[Run]:
        """All combinations. ConfigError if two would share a folder, or a metric that the table needs is off."""
        found = [self._run(labels) for labels in itertools.product(*self.grid.values())]
        names = Counter(run.name for run in found)
        if wrong := [name for name in names if not is_file_name(name)]:
            raise ConfigError(f"a run's labels make the folder name {wrong[0]!r}: it must name a folder in output_dir")
        if shared := [name for name, count in names.items() if count > 1]:
            raise ConfigError(f"{names[shared[0]]} runs would share the folder {shared[0]!r}: name their labels apart")
        for name in TABLES[self.table].needs:
            if any(run.settings.get(name) is False for run in found):
                raise ConfigError(f"{name} is False: it must be true, the table {self.table!r} reads what it writes")
        return found

    def with_base(self, settings: Mapping[str, object]) -> Experiment:
        """Override knobs of all runs, in the axes' labels too. ConfigError for a knob that is itself an axis."""
        given = canonical(settings)
        if axes := [name for name in given if name in self.grid]:
            raise ConfigError(f"{axes[0]} is an axis of this experiment: give its values as --axis {axes[0]}=A,B")
        grid = {name: {label: _without(set(given), knobs) for label, knobs in axis.items()}
                for name, axis in self.grid.items()}  # fmt: skip
        return Experiment(self.output_dir, self.table, {**self.base, **given}, grid)

    def with_axis(self, name: str, labels: Sequence[str]) -> Experiment:
        """Restrict an axis to these labels. An axis named by its knob also accepts new values."""
        if name not in self.grid:
            raise ConfigError(
                f"axis {name!r} is unknown; the nearest of {', '.join(self.grid)} is {nearest(name, self.grid)!r}"
            )
        known = self.grid[name]
        if unknown := [label for label in labels if label not in known and not _is_knob(name)]:
            raise ConfigError(f"axis {name!r} has no {unknown[0]!r}; it has {', '.join(known)}")
        axis = {label: known[label] if label in known else canonical({name: label}) for label in labels}
        return Experiment(self.output_dir, self.table, self.base, {**self.grid, name: axis})

    def _run(self, labels: Sequence[str]) -> Run:
        settings = dict(self.base)
        for axis, label in zip(self.grid.values(), labels, strict=True):
            settings |= axis[label]
        return Run("_".join(label.replace("/", "-") for label in labels) or "run", settings)


def read_experiment(path: Path, test: bool = False) -> Experiment:
    """The experiment of a file, or its --test form. ConfigError if the file is invalid."""
    content = read_yaml(path)
    try:
        return _experiment(path, test, _checked(content))
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from None


def _experiment(path: Path, test: bool, content: Mapping[str, Any]) -> Experiment:
    short = content["test"] if test else {}
    output_dir = f"results/test/{path.stem}" if test else content["output_dir"]
    base, grid = ({**content[key], **short.get(key, {})} for key in ("base", "grid"))
    return Experiment(output_dir, content["table"], canonical(base), {name: _axis(name, grid[name]) for name in grid})


def _checked(content: Any) -> Mapping[str, Any]:
    """The checked keys of an experiment; absent or empty mappings become empty dicts."""
    if not isinstance(content, Mapping):
        raise ConfigError(f"it holds {short_repr(content)}: an experiment is a mapping of {', '.join(KEYS)}")
    if unknown := set(content) - set(KEYS):
        raise ConfigError(f"{unknown.pop()!r} is unknown; an experiment has {', '.join(KEYS)}")
    if missing := [key for key in ("output_dir", "table") if key not in content]:
        raise ConfigError(f"{missing[0]!r} is missing; {_ALLOWED[missing[0]]}")
    if str(content["table"]) not in TABLES:
        hint = nearest(str(content["table"]), TABLES)
        raise ConfigError(f"table is {short_repr(content['table'])}: {_ALLOWED['table']}; the nearest is {hint!r}")
    test = _mapping(content, "test")
    inner = {key: _mapping(content, key) for key in ("base", "grid")}
    return {**content, **inner, "test": {key: _mapping(test, key, "test.") for key in test}}


def _mapping(content: Mapping[str, Any], key: str, section: str = "") -> Mapping[str, Any]:
    value = content.get(key) or {}
    if not isinstance(value, Mapping):
        raise ConfigError(f"{section}{key} is {short_repr(value)}: it must be a mapping")
    return value


def _axis(name: str, values: Any) -> Axis:
    """The axis' labels in order, each with the knobs that it sets."""
    if values and isinstance(values, Mapping):
        return {str(label): canonical(_mapping(values, label, f"axis {name!r}: ")) for label in values}
    if values and isinstance(values, list):
        return {str(value): canonical({name: value}) for value in values}
    raise ConfigError(
        f"axis {name!r} is {short_repr(values)}: it must be a non-empty list of values, or a mapping of labels to knobs"
    )


def _without(names: AbstractSet[str], knobs: Mapping[str, object]) -> Mapping[str, object]:
    return {name: value for name, value in knobs.items() if name not in names}


def _is_knob(name: str) -> bool:
    try:
        canonical({name: "none"})
    except ConfigError as error:
        return "unknown setting" not in str(error)
    return True
