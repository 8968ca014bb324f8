"""What a report must look like: the schema, and what no schema can say."""

from __future__ import annotations

import json
import math
from functools import cache
from importlib import resources
from itertools import pairwise

from keras_emr.errors import UserError, unknown

SCHEMA = "keras-emr-report/1"
_FAMILY, _VERSION = SCHEMA.split("/")
_TYPES = {
    "object": "an object",
    "array": "a list",
    "string": "text",
    "integer": "a whole number",
    "number": "a number",
    "boolean": "true or false",
    "null": "null",
}
# Rates may have been rounded to four digits.
_ROUNDING = 1e-4


@cache
def schema():
    """The JSON Schema (draft 2020-12) of reports, as a dictionary."""
    file = resources.files("keras_emr.reports") / "schema.json"
    return json.loads(file.read_text(encoding="utf-8"))


def validate(report):
    """Raise unless ``report`` is a whole and consistent report.

    Besides the schema: plain JSON values without NaN and infinities, lengths that fit each other,
    and rates that are the counts' (so that no example that is wrong clean counts as robust, and
    no accuracy "of AutoAttack" stands in a report of less than AutoAttack).

    Args:
        report: dictionary.

    Raises:
        UserError: one line with the first field that is wrong, what it is and what was expected.
    """
    if not isinstance(report, dict):
        raise _wrong("", "not a report", type(report).__name__, f"an object of schema {SCHEMA}")
    _require_version(report.get("schema"))
    _require_plain(report, "")
    from jsonschema import Draft202012Validator

    errors = Draft202012Validator(schema()).iter_errors(report)
    first = min(errors, key=lambda e: (len(e.absolute_path), list(map(str, e.path))), default=None)
    if first is not None:
        raise _broken(first)
    for where, fine, received, expected in _consistency(report):
        if not fine:
            raise _wrong(where, "does not fit the rest", received, expected)


def _require_version(name):
    family, _, version = name.partition("/") if isinstance(name, str) else ("", "", "")
    if family == _FAMILY and version.isdigit() and int(version) > int(_VERSION):
        raise UserError(
            f"report: made by a newer keras_emr. Received: schema {name!r}. Expected {SCHEMA!r}; "
            "upgrade keras-emr to read it."
        )
    if name != SCHEMA:
        shown = "no schema" if name is None else f"schema {name!r}"
        raise UserError(
            f"report: not a report. Received: {shown:.80}. Expected schema {SCHEMA!r}, which "
            "keras-emr evaluate writes."
        )


def _require_plain(value, where):
    """Only what JSON can hold; NumPy's numbers and NaN slip through a schema."""
    if type(value) is dict:
        for key, part in value.items():
            if type(key) is not str:
                raise _wrong(where, "a key is not text", repr(key), "text")
            _require_plain(part, f"{where}.{key}" if where else key)
    elif type(value) is list:
        for i, part in enumerate(value):
            _require_plain(part, f"{where}[{i}]")
    elif isinstance(value, float) and not math.isfinite(value):
        raise _wrong(where, "not a finite number", value, "a finite number, or null")
    elif not (value is None or isinstance(value, str | float) or type(value) in (bool, int)):
        raise _wrong(where, "not plain JSON", type(value).__name__, "text, number, list or object")


def _broken(error):
    """A schema's error in our words: jsonschema's can run over pages."""
    where = _place(error.absolute_path)
    what, keys = error.schema.get("description", ""), error.instance
    if error.validator == "required":
        name = next(name for name in error.validator_value if name not in keys)
        meaning = error.schema["properties"][name].get("description", "")
        received = ", ".join(map(str, keys)) or "nothing"
        return _wrong(f"{where}.{name}" if where else name, "missing", received, meaning)
    if error.validator == "additionalProperties":
        known = error.schema["properties"]
        name = next(name for name in keys if name not in known)
        return unknown(f"field in report{f', {where}' if where else ''}", name, known)
    received = _short(error.instance)
    if error.validator == "type":
        names = error.validator_value
        names = [names] if isinstance(names, str) else names
        expected = " or ".join(_TYPES[name] for name in names)
        return _wrong(where, "wrong type", received, f"{expected}: {what}")
    if error.validator in ("enum", "const"):
        options = [error.validator_value] if error.validator == "const" else error.validator_value
        return _wrong(where, "unknown value", received, f"one of: {', '.join(options)}")
    rules = {
        "minimum": ">=",
        "maximum": "<=",
        "exclusiveMinimum": ">",
        "minItems": "at least this many:",
        "maxItems": "at most this many:",
        "minLength": "text of at least this length:",
        "pattern": "a date such as 2025-01-31,",
    }
    rule = f"{rules.get(error.validator, error.validator)} {error.validator_value}"
    return _wrong(where, "bad value", received, f"{rule}: {what}")


def _consistency(report):
    """``(field, whether it fits, received, expected)``, one by one."""
    accuracy, classes = report["accuracy"], report["data"]["classes"]
    n, correct, survived = accuracy["n"], accuracy["correct"], accuracy["survived"]

    def near(where, value, expected, text, tolerance=_ROUNDING):
        return where, abs(value - expected) <= tolerance, value, f"{text}, {expected:.6g}"

    yield "accuracy.n", n <= report["data"]["n"], n, f"at most data.n, {report['data']['n']}"
    yield "accuracy.correct", correct <= n, correct, f"at most n, {n}"
    yield "accuracy.survived", survived <= correct, survived, f"at most correct, {correct}"
    yield near("accuracy.clean", accuracy["clean"], correct / n, "correct / n")
    yield near("accuracy.robust", accuracy["robust"], survived / n, "survived / n")
    yield from _robustbench(report, near)
    for i, attack in enumerate(report["attacks"]):
        where, attacked, broken = f"attacks[{i}]", attack["attacked"], attack["broken"]
        yield f"{where}.attacked", attacked <= correct, attacked, f"at most correct, {correct}"
        yield f"{where}.broken", broken <= attacked, broken, f"at most attacked, {attacked}"
        rate, left = attack["robust_accuracy"], (attacked - broken) / n
        yield near(f"{where}.robust_accuracy", rate, left, "(attacked - broken) / n")
        bound = accuracy["robust"] - _ROUNDING
        text = "at least accuracy.robust, the worst case over all attacks"
        yield f"{where}.robust_accuracy", rate >= bound, rate, text
    for name, curve in report["curves"].items():
        if curve is not None:
            x, y = curve["x"], curve["robust_accuracy"]
            where = f"curves.{name}"
            yield f"{where}.robust_accuracy", len(x) == len(y), len(y), f"as many as x, {len(x)}"
            yield f"{where}.x", _rising(x), _short(x), "numbers in rising order"
    for name, matrix in report["confusion"].items():
        square = len(matrix) == classes and all(len(row) == classes for row in matrix)
        shape = f"{len(matrix)} rows"
        yield f"confusion.{name}", square, shape, f"{classes} rows of {classes} counts"
        total = sum(map(sum, matrix))
        yield f"confusion.{name}", total == n, f"{total} images", f"n, {n}"
    for at, margins in (report["margins"] or {}).items():
        for name in ("l2", "linf", "weight_norm"):
            edges, counts = margins[name]["edges"], margins[name]["counts"]
            where = f"margins.{at}.{name}"
            more = f"one more than counts, {len(counts) + 1}"
            yield f"{where}.edges", len(edges) == len(counts) + 1, len(edges), more
            yield f"{where}.edges", _rising(edges), _short(edges), "numbers in rising order"
            yield f"{where}.counts", sum(counts) <= n, sum(counts), f"at most n, {n}"
    found = len(report["per_class"])
    yield "per_class", found == classes, f"{found} entries", f"one for each class, {classes}"


def _robustbench(report, near):
    entry, accuracy, threat = report["robustbench"], report["accuracy"], report["threat_model"]
    name, norm = entry["threat_model"], threat["norm"]
    yield "robustbench.threat_model", name.lower() == norm, name, f"the threat model's, {norm}"
    yield near("robustbench.eps", entry["eps"], threat["epsilon"], "the threat model's", 1e-9)
    percent = 100 * accuracy["clean"]
    yield near("robustbench.clean_acc", entry["clean_acc"], percent, "100 clean", 0.011)
    yield "robustbench.n", entry["n"] == accuracy["n"], entry["n"], f"{accuracy['n']}"
    found = entry["autoattack_acc"]
    if found is not None:
        where = "robustbench.autoattack_acc"
        yield where, report["complete"], found, "null: the evaluation was cut short"
        bound = 100 * accuracy["robust"]
        yield where, found >= bound - 0.011, found, f"at least 100 accuracy.robust, {bound:.6g}"


def _rising(values):
    return all(a < b for a, b in pairwise(values))


def _place(path):
    parts = "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in path)
    return parts.removeprefix(".")


def _short(value):
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _wrong(where, what, received, expected):
    field = f" {where}:" if where else ""
    expected = expected.rstrip(".")
    return UserError(f"report:{field} {what}. Received: {received}. Expected {expected}.")
