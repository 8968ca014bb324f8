"""The README's commands are the ones that are run, and its example runs."""

import re
import subprocess
import sys
from pathlib import Path

import keras
import pytest

import keras_emr

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()


def blocks(language):
    return re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)


def test_ci_runs_the_readme_test_command():
    command = next(b.strip() for b in blocks("sh") if "python -m tests" in b)
    assert command in (ROOT / ".ci" / "run").read_text().splitlines()


def test_ci_deletes_nothing():
    """It runs in a developer's clone too, where `.venv` may be theirs."""
    lines = (ROOT / ".ci" / "run").read_text().splitlines()
    assert not [line for line in lines if re.search(r"\brm\b|--clear", line)]


def test_python_example_runs(tmp_path):
    code = "\n".join(blocks("python"))  # the later ones go on with the names of the first
    quick = (
        ("epochs=20", "epochs=1, verbose=0"),
        ("steps=10", "steps=1"),
        ("steps=50, restarts=5", "steps=2"),
        ('norm="linf")', 'norm="linf", attacks=[ke.PGD(8 / 255, steps=2)])'),
    )
    for slow, fast in quick:
        assert slow in code
        code = code.replace(slow, fast)
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-2000:]
    numbers = [float(word) for word in done.stdout.split()]  # no fit but a quick, silent one
    assert len(numbers) == 5 and all(0 <= n <= 1 for n in numbers)
    assert (tmp_path / "robust.keras").exists()


def test_mail_in_the_example_reweights_before_training_ends():
    code = blocks("python")[0]
    (burn_in,), (epochs,) = re.findall(r"burn_in=(\d+)", code), re.findall(r"epochs=(\d+)", code)
    assert 0 < int(burn_in) < int(epochs)


@pytest.mark.slow
@pytest.mark.parametrize(
    "imports", ["import keras, keras_emr", "import keras_emr, keras; keras_emr.RobustClassifier"]
)
def test_a_saved_classifier_loads_as_the_readme_says(tmp_path, imports):
    model = keras.Sequential([keras.Input((4, 4, 1)), keras.layers.Flatten()])
    model.add(keras.layers.Dense(3))
    robust = keras_emr.RobustClassifier(model, "at", attack=keras_emr.PGD(0.1))
    robust.compile()
    robust.save(tmp_path / "c.keras")
    code = f"{imports}; print(type(keras.saving.load_model('c.keras')).__name__)"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.stdout.split() == ["RobustClassifier"], done.stderr[-2000:]


def test_flags_in_the_readme_exist():
    sys.path.insert(0, str(ROOT / "cli"))
    import click

    from keras_emr_cli.main import cli

    def options(command, context):
        yield from (flag for p in command.params for flag in (*p.opts, *p.secondary_opts))
        for name in command.list_commands(context) if isinstance(command, click.Group) else ():
            yield from options(command.get_command(context, name), context)

    known = set(options(cli, click.Context(cli)))
    commands = [line for b in blocks("sh") for line in b.splitlines() if "keras-emr " in line]
    flags = {flag for line in commands for flag in re.findall(r"--[a-z][a-z-]+", line)}
    assert flags and flags <= known
