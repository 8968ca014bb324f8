"""The README's promise, in a process of its own: ``keras-emr train`` with no options."""

import json
import subprocess
import sys
import time

import pytest


@pytest.mark.slow
def test_the_default_run(tmp_path):
    began = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "keras_emr_cli.main", "train"],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        timeout=600,
    )
    seconds = time.perf_counter() - began
    assert done.returncode == 0, done.stderr[-2000:]
    run = tmp_path / "runs" / "digits-small-cnn-trades-emr"
    report = json.loads((run / "report" / "training.json").read_text())
    print(done.stdout, f"\nwall time {seconds:.0f} s")
    standard, robust = (
        next(r for r in report["results"] if r["model"] == m and r["checkpoint"] == "best")
        for m in ("standard", "trades + EMR")
    )
    for result in (standard, robust):
        assert result["n"] == 360 and result["accuracy"] >= 0.95
        assert result["attack"]["steps"] == 50 and result["attack"]["restarts"] == 5
        assert result["max_perturbation"] <= 0.15 + 1e-6
    assert robust["robust_accuracy"] >= standard["robust_accuracy"] + 0.30
    assert robust["chosen_by"] == "val_robust_accuracy"
    for name in ("standard", "trades + EMR", "PGD-50x5", "margin Linf", "train s"):
        assert name in done.stdout
    assert seconds < 240  # about a minute alone; here something else runs beside it
