"""The public names, and what importing them costs."""

import subprocess
import sys

import keras_emr

PUBLIC = [
    "APGD",
    "AWP",
    "AdversarialTraining",
    "AutoAttack",
    "BIM",
    "EMA",
    "EffectiveMarginLogger",
    "EffectiveMarginRegularizer",
    "FGSM",
    "FreeAdversarialTraining",
    "Generator",
    "LBGAT",
    "LearnedAttack",
    "LearnedMaximizer",
    "LineSearch",
    "MAIL",
    "MART",
    "MMA",
    "PGD",
    "RobustClassifier",
    "SWA",
    "Standard",
    "TRADES",
    "UserError",
    "__version__",
    "distribute",
    "effective_margins",
    "evaluate_attack",
    "hypersphere_head",
    "load_data",
    "make_model",
    "margin_summary",
    "mlp",
    "small_cnn",
    "train",
]


def test_public_names_are_pinned():
    assert sorted(keras_emr.__all__) == sorted(PUBLIC) == sorted(dir(keras_emr))


def test_every_public_name_is_documented():
    for name in PUBLIC:
        if name != "__version__":
            doc = getattr(keras_emr, name).__doc__
            assert doc and len(doc) > 40, name


def test_importing_the_package_does_not_import_keras():
    code = "import sys, keras_emr; print('keras' in sys.modules, 'numpy' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.split() == ["False", "False"], done.stderr


def test_only_backend_names_a_backend():
    """Everything else is keras.ops: no other module imports tensorflow, jax or torch."""
    import re
    from pathlib import Path

    pattern = re.compile(r"^\s*(import|from) (tensorflow|jax|torch)\b", re.MULTILINE)
    folder = Path(keras_emr.__file__).parent
    named = {
        path.relative_to(folder).parts[0]
        for path in folder.rglob("*.py")
        if pattern.search(path.read_text())
    }
    assert named == {"backend"}


def test_unknown_attribute():
    try:
        keras_emr.nothing  # noqa: B018
    except AttributeError as error:
        assert "no attribute 'nothing'" in str(error)
    else:
        raise AssertionError
