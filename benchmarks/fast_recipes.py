"""Robust accuracy and training time of settings of ``keras-emr train``, side by side.

    python benchmarks/fast_recipes.py [--common '--defense at --emr 0'] [--seeds 0,1,2] [--json OUT]
        [--variant 'NAME: FLAGS' ...]

Without ``--variant``: the default settings beside ``--preset fast``. Every variant is trained with
every seed, the variants taking turns, and the ``best`` model is judged by AutoAttack "standard" on
the test images. Prints, over the seeds, mean and range of the accuracies, and the median and range
of the time that training took over that of the first variant with the same seed: all epochs with
validation, compilation included, without start-up and final evaluation.
"""

import argparse
import json
import shlex
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

CLI = [sys.executable, "-m", "keras_emr_cli.main"]


def answer(*words):
    """What a command prints with ``--json``."""
    done = subprocess.run(
        [*CLI, *words, "--json", "--quiet"], stdout=subprocess.PIPE, text=True, check=True
    )
    return json.loads(done.stdout)


def run(flags, seed, folder, options):
    """Train and judge one model."""
    words = ["--no-baseline", "--eval-steps", "10", "--eval-restarts", "1", "--seed", str(seed)]
    trained = answer("train", *flags, *words, "--out", str(folder))
    best = next(r for r in trained["results"] if r["checkpoint"] == "best")
    attack = ["--attacks", "autoattack", "--extra-examples", "0"]
    if options.n_examples:
        attack += ["--n-examples", str(options.n_examples)]
    judged = answer("evaluate", str(folder), *attack)
    return {
        "seconds": best["train_seconds"],
        "epoch": best["epoch"],
        "clean": 100 * judged["accuracy"]["clean"],
        "robust": 100 * judged["accuracy"]["robust"],
        "versions": trained["versions"],
        "hardware": trained["hardware"],
    }


def spread(values, digits, middle=np.mean):
    return f"{middle(values):.{digits}f} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--common", default="", help="flags of all variants")
    parser.add_argument(
        "--variant", action="append", help="'NAME: FLAGS'; the first is the measure"
    )
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--n-examples", type=int, help="the first N test images; default all")
    parser.add_argument("--json", help="write every number there")
    options = parser.parse_args()
    given = options.variant or ["default:", "fast: --preset fast"]
    variants = {}
    for text in given:
        name, _, flags = text.partition(":")
        variants[name.strip()] = shlex.split(options.common) + shlex.split(flags)
    found = {name: [] for name in variants}
    with tempfile.TemporaryDirectory() as scratch:
        for seed in map(int, options.seeds.split(",")):
            for name, flags in variants.items():
                folder = Path(scratch) / f"{name}-{seed}"
                found[name].append(run(flags, seed, folder, options))
                print(seed, name, found[name][-1], file=sys.stderr, flush=True)
    first = next(iter(found.values()))
    print("| settings | clean % | AutoAttack % | time over the first's |\n|---|---|---|---|")
    for name, rows in found.items():
        ratios = [r["seconds"] / f["seconds"] for r, f in zip(rows, first, strict=True)]
        columns = [spread([r[key] for r in rows], 1) for key in ("clean", "robust")]
        print(f"| {name} | {' | '.join(columns)} | {spread(ratios, 2, np.median)} |")
    if options.json:
        Path(options.json).write_text(json.dumps({"options": vars(options), "found": found}))


if __name__ == "__main__":
    main()
