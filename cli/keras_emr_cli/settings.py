"""Typed settings: one table per command gives its flags, environment, config keys and checks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from pathlib import Path
from typing import Any

import click

from keras_emr.errors import UserError, unknown

AUTO = "auto"
BACKENDS = ("tensorflow", "jax", "torch")
NORMS = ("linf", "l2")
SEEDS = 2**31  # what Keras accepts on every backend


class Ratio(float):
    """A number that remembers how it was written: ``8/255`` stays ``8/255`` wherever it shows."""

    text: str

    def __new__(cls, text):
        text = str(text).strip()
        value = float(Fraction(text)) if "/" in text else float(text)
        ratio = super().__new__(cls, value)
        ratio.text = text
        return ratio

    def __str__(self):
        return self.text

    def __reduce__(self):
        return (Ratio, (self.text,))


@dataclass(frozen=True)
class Setting:
    """One setting.

    ``kind``: ``text``, ``choice``, ``int``, ``float``, ``ratio``, ``bool``, ``ints`` or ``names``
    (lists).
    ``default``: ``None`` shows as ``auto`` where ``auto`` says what that means.
    ``low``, ``high``: bounds, ``low_open`` excludes the lower one. ``names``: a list of choices.
    ``check``: of a text: returns it, or raises :class:`UserError`.
    """

    name: str
    kind: str
    default: Any
    help: str
    choices: Sequence[str] = ()
    auto: str | None = None
    low: float | None = None
    high: float | None = None
    low_open: bool = False
    group: str = "run"
    check: Callable[[str], str] | None = None

    @property
    def flag(self) -> str:
        return "--" + self.name.replace("_", "-")

    @property
    def environment(self) -> str:
        return "KERAS_EMR_" + self.name.upper()

    def parse(self, raw: Any, where: str):
        """The typed value of ``raw``. Raises :class:`UserError` naming ``where`` it came from."""
        if raw is None or (self.auto is not None and str(raw).lower() == AUTO):
            if self.auto is None and self.default is not None:
                raise self._error(raw, where, f"a value ({self.expected()})")
            return None
        try:
            value = self._convert(raw)
        except UserError as error:
            raise UserError(f"{where}: {error}") from None
        except (ValueError, TypeError, ArithmeticError):
            raise self._error(raw, where, self.expected()) from None
        if self.kind in ("int", "float", "ratio", "ints"):
            numbers = value if self.kind == "ints" else [value]
            if not all(map(self._in_range, numbers)):
                raise self._error(raw, where, self.expected())
        return value

    def _in_range(self, value):
        finite = value == value and abs(value) != float("inf")
        low_ok = self.low is None or (value > self.low if self.low_open else value >= self.low)
        return finite and low_ok and (self.high is None or value <= self.high)

    def _convert(self, raw):
        if self.kind == "int":
            return _whole(raw)
        if self.kind == "float":
            if isinstance(raw, bool):
                raise ValueError
            return float(raw)
        if self.kind == "ratio":
            if isinstance(raw, bool):
                raise ValueError
            return Ratio(raw)
        if self.kind == "bool":
            if isinstance(raw, bool):
                return raw
            words = {"true": True, "1": True, "yes": True, "false": False, "0": False, "no": False}
            if str(raw).lower() not in words:
                raise ValueError
            return words[str(raw).lower()]
        if self.kind == "ints":
            parts = raw if isinstance(raw, list) else str(raw).split(",")
            return [_whole(part) for part in parts]
        if self.kind == "names":
            parts = raw if isinstance(raw, list) else str(raw).split(",")
            names = [str(part).strip() for part in parts if str(part).strip()]
            for name in names:
                if name not in self.choices:
                    raise unknown(self.name.removesuffix("s"), name, self.choices)
            if not names:
                raise ValueError
            return names
        if self.kind == "choice" and str(raw) not in self.choices:
            raise unknown(self.name.replace("_", " "), str(raw), self.choices)
        return self.check(str(raw)) if self.check else str(raw)

    def expected(self):
        if self.kind == "ratio":
            what = "a number or a fraction such as 8/255"
        else:
            what = {
                "int": "a whole number",
                "float": "a number",
                "bool": "true or false",
                "ints": "whole numbers separated by commas",
                "text": f"one of: {', '.join(self.choices)}" if self.choices else "text",
                "names": f"names separated by commas: {', '.join(self.choices)}",
            }.get(self.kind, self.kind)
        if self.low is not None:
            what += f" {'>' if self.low_open else '>='} {self.low:g}"
        if self.high is not None:
            what += f" and <= {self.high:g}" if self.high < 1e6 else f" and <= {self.high:.0f}"
        return what + (f", or {AUTO}" if self.auto is not None else "")

    def _error(self, raw, where, expected):
        shown = "nothing" if raw is None else repr(raw)
        return UserError(f"{where}: bad value. Received: {shown}. Expected {expected}.")


def grouped(name: str, *settings: Setting) -> list[Setting]:
    """``settings`` under a heading of their own in the config template."""
    return [replace(setting, group=name) for setting in settings]


@dataclass(frozen=True)
class Merged:
    """Values, and where each came from: flag, environment, config, preset or default."""

    values: Mapping[str, Any]
    origins: Mapping[str, str] = field(default_factory=dict)

    def __getattr__(self, name):
        try:
            return self.values[name]
        except KeyError:
            raise AttributeError(name) from None

    def plain(self):
        """Values as YAML and JSON can hold them, ``None`` as ``auto``."""
        shown = {}
        for name, value in self.values.items():
            if isinstance(value, Ratio):
                # `8/255` as it was written, plain numbers as numbers.
                value = value.text if "/" in value.text else float(value)
            shown[name] = AUTO if value is None else value
        return shown


def read_config(path: str, table: Sequence[Setting]) -> dict[str, Any]:
    """The mapping in YAML file ``path`` or ``recipe:NAME``.

    Unknown keys are refused with the nearest known one.
    """
    import yaml

    from keras_emr.recipes import locate

    path = locate(path)
    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"config: cannot read the file: {reason}. Received: {path!r}.") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise UserError(f"config: not valid YAML{line}. Received: {path!r}.") from None
    if content is None:
        return {}
    if not isinstance(content, dict):
        raise UserError(f"config: expected `key: value` lines. Received: {path!r}.")
    known = [setting.name for setting in table]
    values = {}
    for key, value in content.items():
        name = str(key).replace("-", "_")
        if name not in known:
            raise unknown(f"key in config file {path}", str(key), known)
        if name in values:
            raise UserError(f"config: the same key twice. Received: {key!r} in {path!r}.")
        values[name] = value
    return values


def _whole(raw):
    if isinstance(raw, bool) or (isinstance(raw, float) and not raw.is_integer()):
        raise ValueError
    return int(raw)


def merge(
    table: Sequence[Setting],
    flags: Mapping[str, Any],
    config: str | None = None,
    environment: Mapping[str, str] | None = None,
    presets: Mapping[str, Mapping[str, Any]] | None = None,
) -> Merged:
    """Flag over environment over config file over preset over default.

    Args:
        table: the command's settings.
        flags: raw values by name, ``None`` where not given.
        config: path of a YAML file, or ``None``.
        environment: ``os.environ`` unless given.
        presets: what each value of the setting ``preset`` makes of other settings.
    """
    environment = os.environ if environment is None else environment
    from_file = read_config(config, table) if config else {}
    values, origins = {}, {}
    for setting in table:
        name = setting.name
        if flags.get(name) is not None:
            raw, origin, where = flags[name], "flag", setting.flag
        elif setting.environment in environment:
            raw, origin = environment[setting.environment], "environment"
            where = setting.environment
        elif name in from_file:
            raw, origin, where = from_file[name], "config", f"config key {name}"
        else:
            raw, origin, where = setting.default, "default", setting.flag
        values[name] = setting.parse(raw, where)
        origins[name] = origin
    chosen = (presets or {}).get(values.get("preset"), {})
    for setting in table:
        value = chosen.get(setting.name)
        value = value(values) if callable(value) else value
        if value is not None and origins[setting.name] == "default":
            values[setting.name] = setting.parse(value, setting.flag)
            origins[setting.name] = "preset"
    return Merged(values, origins)


def options(table: Sequence[Setting]):
    """Click decorator that adds a flag for every setting; values arrive unparsed."""

    def decorate(command):
        for setting in reversed(table):
            default = setting.auto if setting.default is None else setting.default
            text = f"{setting.help}  [default: {default}]" if default is not None else setting.help
            if setting.kind == "bool":
                name = setting.name.replace("_", "-")
                option = click.option(
                    f"--{name}/--no-{name}", setting.name, default=None, help=text
                )
            else:
                metavar = "|".join(setting.choices) or setting.kind.upper()
                option = click.option(setting.flag, setting.name, metavar=metavar, help=text)
            command = option(command)
        return command

    return decorate


def template(table: Sequence[Setting]) -> str:
    """A config file with every setting at its default, commented."""
    import yaml

    lines = ["# keras-emr train --config FILE; flags and KERAS_EMR_... variables come first."]
    group = None
    for setting in table:
        if setting.group != group:
            group = setting.group
            lines += ["", f"# --- {group} ---"]
        lines.append(f"# {setting.help}")
        if setting.choices:
            lines.append(f"#   one of: {', '.join(setting.choices)}")
        if setting.auto is not None:
            lines.append(f"#   auto: {setting.auto}")
        value = AUTO if setting.default is None else setting.default
        dumped = yaml.safe_dump({setting.name: value}, default_flow_style=True).strip()[1:-1]
        lines.append(dumped)
    return "\n".join(lines) + "\n"
