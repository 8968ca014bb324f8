"""The file of ``--space``: read, and checked by the parsers of the options that it names."""

from __future__ import annotations

from pathlib import Path

from keras_emr.errors import UserError, unknown
from keras_emr_cli.distributed import PLACE
from keras_emr_cli.settings import Ratio
from keras_emr_cli.train_settings import TRAIN

# All trials are judged on the same data by the same attack, in one process.
_FIXED = {
    **dict.fromkeys(
        ("data", "validation", "split_seed", "image_size", "skip_bad", "stream", "tfds_dir"),
        "all trials are judged on the same validation data",
    ),
    **dict.fromkeys(
        ("val_steps", "eval_steps", "eval_restarts"), "all trials are judged by the same attacks"
    ),
    "backend": "a process has one backend",
    "baseline": "trials have none",
    "out": "every trial has a folder of its own",
    "preset": "it stands for values of other options: search those",
    **dict.fromkeys(("tensorboard", "checkpoint_every"), "it changes no result"),
    **dict.fromkeys(("distribute", "devices", *PLACE), "a trial is trained on one device"),
}
_KEYS = ("type", "values", "low", "high", "step", "sampling", "when")
_TYPES = ("choice", "int", "float")

EXAMPLE = """\
# What `keras-emr tune --space FILE` searches. A key is an option of `keras-emr train`, with
# underscores or dashes; its values must be what that option takes.

# A list: one of these values.
defense: [at, trades]
averaging: [none, ema]

# A range of numbers, both ends included. sampling: linear (default), or log: evenly in orders of
# magnitude.
learning_rate: {type: float, low: 0.0003, high: 0.01, sampling: log}
emr: {type: float, low: 0.001, high: 0.1, sampling: log}

# step: the distance of two values; with log their ratio, so that this is 32, 64 or 128.
batch_size: {type: int, low: 32, high: 128, step: 2, sampling: log}

# when: only where another parameter of this file, one with a list, has one of these values;
# elsewhere the option is what a flag, --config or its default says.
beta: {type: float, low: 1, high: 10, when: {defense: [trades]}}

# The long form of a list, which can have `when` as well. auto is a value of options that know it.
label_smoothing: {type: choice, values: [0, 0.1, 0.2], when: {defense: [at]}}

# epsilon and norm of training can be searched if --judge-epsilon and --judge-norm say in which
# ball the trials are compared. Not to be searched: data, validation, split_seed, backend, out.
"""


def read_space(path):
    """The parameters in YAML file ``path``, and the file's text.

    Returns:
        List of :class:`keras_emr.tuning.space.Choice` and ``Range``, parents first; text.

    Raises:
        UserError: one line that names the key, the value and what was expected.
    """
    import yaml

    try:
        text = Path(path).read_text()
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "not a text file"
        raise UserError(f"space: cannot read the file: {reason}. Received: {path!r}.") from None
    try:
        content = yaml.safe_load(text)
    except (yaml.YAMLError, ValueError) as error:
        place = getattr(error, "problem_mark", None)
        line = f" at line {place.line + 1}" if place else ""
        raise UserError(f"space: not valid YAML{line}. Received: {path!r}.") from None
    if not isinstance(content, dict) or not content:
        raise UserError(
            f"space: expected `option: values` lines. Received: {path!r}. An example: keras-emr "
            "config space."
        )
    settings = {setting.name: setting for setting in TRAIN}
    found = {}
    for key, entry in content.items():
        name = str(key).replace("-", "_")
        if name not in settings:
            known = [known for known in settings if known not in _FIXED]
            raise unknown(f"parameter in the space {path}", str(key), known)
        if name in found:
            raise UserError(f"space: the same parameter twice. Received: {key!r} in {path!r}.")
        if name in _FIXED:
            raise UserError(
                f"space: {name} cannot be searched: {_FIXED[name]}. Received: {key!r} in {path!r}."
            )
        found[name] = _parameter(settings[name], entry)
    for parameter in found.values():
        _check_when(parameter, found)
    return _parents_first(found), text


def _parameter(setting, entry):
    from keras_emr.tuning.space import Choice, Range

    where = f"space: {setting.name}"
    if isinstance(entry, list):
        entry = {"type": "choice", "values": entry}
    if not isinstance(entry, dict):
        raise UserError(
            f"{where}: expected a list of values or a range. Received: {entry!r}. To fix an option "
            f"give {setting.flag}."
        )
    entry = {str(key): value for key, value in entry.items()}
    for key in entry:
        if key not in _KEYS:
            raise unknown(f"key of {setting.name} in the space", key, _KEYS)
    when = _when(where, entry.pop("when", None))
    kind = str(entry.pop("type", "choice" if "values" in entry else None))
    if kind not in _TYPES:
        raise unknown(f"type of {setting.name} in the space", kind, _TYPES)
    allowed = ("values",) if kind == "choice" else ("low", "high", "step", "sampling")
    for key in entry:
        if key not in allowed:
            raise UserError(
                f"{where}: a {kind} has no {key}. Received: {entry[key]!r}. Expected: "
                f"{', '.join(allowed)}."
            )
    if kind == "choice":
        return Choice(setting.name, _values(setting, where, entry.get("values")), when)
    return Range(setting.name, **_range(setting, where, kind == "int", entry), when=when)


def _values(setting, where, raw):
    if not isinstance(raw, list) or not raw:
        raise UserError(f"{where}: expected a list of values. Received: {raw!r}.")
    texts = [as_text(setting.parse(value, where)) for value in raw]
    if len(set(texts)) < len(texts):
        raise UserError(f"{where}: the same value twice. Received: {raw!r}.")
    return tuple(texts)


def _range(setting, where, whole, entry):
    wanted = ("int",) if whole else ("float", "ratio")
    if setting.kind not in wanted:
        shown = "int" if whole else "float"
        fix = "type: int" if setting.kind == "int" else "a list of values"
        raise UserError(
            f"{where}: not a range of this type. Received: type: {shown} for an option that takes "
            f"{setting.expected()}. Expected {fix}."
        )
    bounds = {}
    for key in ("low", "high"):
        if entry.get(key) is None:
            raise UserError(f"{where}: a range needs low and high. Received: no {key}.")
        value = setting.parse(entry[key], f"{where}: {key}")
        if value is None:
            raise UserError(f"{where}: {key} is no number. Received: {entry[key]!r}.")
        bounds[key] = int(value) if whole else float(value)
    if not bounds["low"] < bounds["high"]:
        raise UserError(
            f"{where}: low must be below high. Received: low {entry['low']}, high {entry['high']}."
        )
    sampling = str(entry.get("sampling", "linear"))
    if sampling not in ("linear", "log"):
        raise unknown(f"sampling of {setting.name} in the space", sampling, ("linear", "log"))
    if sampling == "log" and bounds["low"] <= 0:
        raise UserError(
            f"{where}: sampling log needs low > 0. Received: low {entry['low']}. For 0 as well, "
            "search two lists."
        )
    return {**bounds, "whole": whole, "sampling": sampling, "step": _step(where, entry, whole)}


def _step(where, entry, whole):
    raw, log = entry.get("step"), entry.get("sampling") == "log"
    if raw is None:
        return None
    try:
        step = float(raw)
        good = step > (1 if log else 0) and step < float("inf") and not isinstance(raw, bool)
        good = good and (not whole or step.is_integer())
    except (TypeError, ValueError):
        good = False
    if not good:
        least = "> 1, the ratio of two values" if log else "> 0"
        kind = "a whole number" if whole else "a number"
        raise UserError(f"{where}: bad step. Received: {raw!r}. Expected {kind} {least}.")
    return int(step) if whole else step


def _when(where, raw):
    if raw is None:
        return {}
    if not isinstance(raw, dict) or not raw:
        raise UserError(
            f"{where}: bad when. Received: {raw!r}. Expected a parameter and its values, such as "
            "{defense: [trades]}."
        )
    return {
        str(name).replace("-", "_"): tuple(
            values if isinstance(values, list) else [values]  # texts once the parent is known
        )
        for name, values in raw.items()
    }


def _check_when(parameter, found):
    from keras_emr.tuning.space import Choice

    where = f"space: {parameter.name}: when"
    settings = {setting.name: setting for setting in TRAIN}
    for name, values in parameter.when.items():
        if not isinstance(found.get(name), Choice) or name == parameter.name:
            raise UserError(
                f"{where}: not another parameter of the space with a list of values. Received: "
                f"{name!r}."
            )
        texts = tuple(as_text(settings[name].parse(value, where)) for value in values)
        for text in texts:
            if text not in found[name].values:
                raise unknown(
                    f"value of {name} in {parameter.name}'s when", text, found[name].values
                )
        parameter.when[name] = texts


def _parents_first(found):
    ordered, left = [], dict(found)
    while left:
        ready = [n for n, p in left.items() if not any(parent in left for parent in p.when)]
        if not ready:
            raise UserError(f"space: when goes in a circle. Received: {', '.join(left)}.")
        ordered += [left.pop(name) for name in ready]
    return ordered


def as_text(value):
    """A parsed value as a flag would have it."""
    if value is None:
        return "auto"
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, list):
        return ",".join(map(str, value))
    if isinstance(value, float) and not isinstance(value, Ratio):
        return f"{value:.10g}"
    return str(value)
