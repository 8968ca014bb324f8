"""Published settings as config files: ``keras-emr train --config recipe:NAME``."""

from pathlib import Path

from keras_emr.errors import unknown

PREFIX = "recipe:"
FOLDER = Path(__file__).parent


def names():
    """Names of all recipes, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def locate(config):
    """The path of ``recipe:NAME``; any other ``config`` as it is.

    Raises :class:`UserError` for a recipe that does not exist.
    """
    if not config.startswith(PREFIX):
        return config
    name = config.removeprefix(PREFIX)
    if name not in names():
        raise unknown("recipe", name, names())
    return str(FOLDER / f"{name}.yaml")


def describe(name):
    """What the head of a recipe says: ``{"Source": ..., "Sure": ..., "Differs": ...}``."""
    facts, last = {}, None
    for line in Path(locate(PREFIX + name)).read_text().splitlines():
        if not line.startswith("# "):
            break
        label, found, rest = line.removeprefix("# ").partition(": ")
        if found and label in ("Source", "Sure", "Differs", "Time and accuracy"):
            last, facts[label] = label, rest
        elif last:
            facts[last] += " " + line.removeprefix("#").strip()
    return facts
