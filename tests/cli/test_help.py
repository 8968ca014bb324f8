"""Help is complete and quick; a mistyped command or option is named, with the nearest one."""

import json
import time

import pytest

from keras_emr import __version__
from keras_emr_cli.bench import BENCH
from keras_emr_cli.evaluate_settings import EVALUATE, EXPORT
from keras_emr_cli.train_settings import TRAIN
from keras_emr_cli.tune_settings import TUNE
from tests.cli.harness import assert_error, call, python, shell

HEAVY = ("keras", "tensorflow", "jax", "torch", "sklearn", "scipy", "pandas", "matplotlib")
SETTINGS = [("train", TRAIN), ("tune", TUNE), ("evaluate", EVALUATE), ("export", EXPORT)]
SETTINGS += [("bench", BENCH)]
# Not heavy, but nothing that a help text needs.
UNNEEDED = ("numpy", "yaml", "rich")

PROBE = """
import json, sys
from keras_emr_cli.main import main
try:
    main(json.loads(sys.argv[1]))
except SystemExit as stop:
    code = stop.code
print(json.dumps([code, sorted(sys.modules)]), file=sys.stderr)
"""


@pytest.mark.parametrize(
    ("arguments", "forbidden"),
    [
        (["--help"], HEAVY + UNNEEDED),
        (["--version"], HEAVY + UNNEEDED),
        (["train", "--help"], HEAVY + UNNEEDED),
        (["tune", "--help"], (*HEAVY, *UNNEEDED, "keras_tuner", "grpc", "tensorboard")),
        (["evaluate", "--help"], HEAVY + UNNEEDED),
        (["export", "--help"], HEAVY + UNNEEDED),
        (["predict", "--help"], HEAVY + UNNEEDED),
        (["bench", "--help"], HEAVY + UNNEEDED),
        (["config", "--help"], HEAVY + UNNEEDED),
        (["config", "show", "--help"], HEAVY + UNNEEDED),
        (["data", "--help"], HEAVY + UNNEEDED),
        (["config", "show"], HEAVY),
        (["data", "list"], HEAVY),
    ],
    ids=" ".join,
)
def test_nothing_heavy_is_imported(arguments, forbidden):
    result = python("-c", PROBE, json.dumps(arguments))
    code, modules = json.loads(result.err)
    assert code == 0
    assert result.out
    assert [name for name in forbidden if name in modules] == []


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"]], ids=" ".join)
def test_help_is_quick(arguments):
    seconds = []
    for _ in range(5):
        began = time.perf_counter()
        assert shell(*arguments).code == 0
        seconds.append(time.perf_counter() - began)
    assert min(seconds) < 0.3, seconds


def test_version(capfd):
    result = call(capfd, "--version")
    assert (result.code, result.err) == (0, "")
    assert result.out == f"keras-emr, version {__version__}\n"


def test_help_lists_the_commands_and_exit_codes(capfd):
    long, short = call(capfd, "--help"), call(capfd, "-h")
    assert long == short
    assert (long.code, long.err) == (0, "")
    commands = ("train", "evaluate", "export", "data", "config", "bench")
    for text in (*commands, "0 ok", "2 usage", "130 Ctrl-C"):
        assert text in long.out


@pytest.mark.parametrize(("name", "table"), SETTINGS)
def test_every_setting_is_a_flag_with_its_default(capfd, name, table):
    result = call(capfd, name, "--help")
    assert result.code == 0
    words = result.out.replace(",", " ").replace("/", " ").split()
    text = "".join(result.out.split())  # words with hyphens are broken over lines
    for setting in table:
        assert setting.flag in words
        if setting.kind == "bool":
            assert f"--no-{setting.flag[2:]}" in words
        default = setting.auto if setting.default is None else setting.default
        assert default is None or "".join(f"[default: {default}]".split()) in text
    for flag in ("--json", "--quiet", "--to" if name == "export" else "--config"):
        assert flag in words


@pytest.mark.parametrize("group", [[], ["data"], ["config"]], ids=str)
def test_a_group_without_a_command_shows_its_help(capfd, group):
    """Readable help with its line breaks, not squeezed into an error line."""
    expected = call(capfd, *group, "--help").out
    result = call(capfd, *group)
    assert (result.out or result.err).strip() == expected.strip()
    assert result.code == 2


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["trian"], ["'trian'", "train"]),
        (["evalute", "--steps", "3"], ["'evalute'", "evaluate"]),
        (["config", "shwo"], ["'shwo'", "show"]),
        (["train", "--epsilonn", "1"], ["--epsilonn", "did you mean --epsilon?"]),
        (["evaluate", "x", "--restart", "1"], ["--restart", "did you mean --restarts?"]),
        (["config", "show", "--bakcend", "jax"], ["--bakcend", "did you mean --backend?"]),
        (["--verison"], ["--verison", "--version"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_a_typo_gets_a_suggestion(capfd, arguments, fragments):
    assert_error(call(capfd, *arguments), 2, *fragments)


@pytest.mark.parametrize(
    ("arguments", "fragments"),
    [
        (["train", "--epochs"], ["--epochs"]),
        (["train", "extra"], ["extra"]),
        (["train", "--resume", "--overwrite", "--out", "x"], ["--resume", "--overwrite"]),
        (["train", "--resume"], ["--out"]),
        (["evaluate"], ["RUN_OR_MODEL"]),
        (["train", "--json=yes"], ["--json"]),
    ],
    ids=lambda value: " ".join(value),
)
def test_wrong_usage(capfd, arguments, fragments):
    assert_error(call(capfd, *arguments), 2, *fragments)


def test_the_module_and_the_script_are_the_same_program():
    result = python("-c", "import sys; from keras_emr_cli.main import main; main(['--version'])")
    assert result == shell("--version")
