#!/usr/bin/env bash
# All of keras_emr that a GPU decides: tests marked gpu, speed, peers, a trained and attacked ResNet-18.
#
# On a machine with a package registry (nothing else of it is needed on the other one):
#
#   benchmarks/gpu.sh --collect-wheels benchmarks/wheels            # for Python 3.12 on x86-64
#   benchmarks/gpu.sh --collect-wheels DIR --for-python 3.13 --for-platform manylinux_2_28_aarch64
#
# On the machine with the GPU, which needs python3 with jax[cuda] and torch and no network; this
# checkout, the wheels in it, and for the training a file of CIFAR-10 (x_train, y_train, x_test, y_test):
#
#   benchmarks/gpu.sh --data cifar10.npz
#   benchmarks/gpu.sh --stages tests,bench --minutes 10
#   benchmarks/gpu.sh --stages train --data cifar10.npz --run /tmp/run --minutes 25   # again: goes on
#
# Options: --stages tests,bench,peers,train   what to do
#          --minutes N       limit of each stage (10, 20, 20 and 60); what is cut short has failed,
#                            but for the training, whose best epoch so far is then attacked
#          --data FILE       as keras-emr train --data; without it train is left out
#          --epochs N        of the training (30), with a cyclic learning rate
#          --n-examples N    test images under AutoAttack (1000)
#          --target X        robust accuracy that the training must reach (0.40)
#          --run DIR         its run folder (OUT/run, which git ignores); one that is there is resumed
#          --wheels DIR      wheels to install where something is missing (benchmarks/wheels)
#          --out DIR         results (benchmarks/results/DATE-GPU)
#          --commit TEXT     of this checkout, where git cannot say it
#
# A failing stage is named and the others run; the exit code is then 1. OUT holds summary.md,
# environment.json, STAGE.log and each stage's JSON. Without a GPU a small part runs on the CPU, to
# try the script, and a line says what was left out. PYTHON names another interpreter than python3.
set -euo pipefail
root=$(cd "$(dirname "$0")/.." && pwd)
python=${PYTHON:-python3}

value() { # of option $1 among the other words, else $2
  local name=$1 found=$2 word
  shift 2
  while (($#)); do
    word=$1
    shift
    if [[ $word == "$name" ]]; then
      (($#)) || { echo "gpu.sh: $name needs a value" >&2; exit 2; }
      found=$1
    elif [[ $word == "$name="* ]]; then
      found=${word#*=}
    fi
  done
  printf '%s' "$found"
}

case "${1:-}" in -h | --help) sed -n '2,/^set /{/^set /d;s/^# \{0,1\}//;p}' "$0"; exit 0 ;; esac

collect=$(value --collect-wheels "" "$@")
if [[ -n $collect ]]; then
  version=$(value --for-python 3.12 "$@")
  platform=$(value --for-platform manylinux_2_28_x86_64 "$@")
  machine=${platform#*_*_*_}
  mkdir -p "$collect"
  # pip takes every platform by its exact name.
  "$python" -m pip download -q --no-deps --only-binary=:all: --implementation cp \
    --python-version "$version" --platform "$platform" --platform "manylinux_2_27_$machine" \
    --platform "manylinux_2_26_$machine" --platform "manylinux_2_24_$machine" \
    --platform "manylinux_2_17_$machine" --platform "manylinux2014_$machine" \
    -r "$root/benchmarks/requirements-gpu.txt" -d "$collect"
  du -sh "$collect" >&2
  exit 0
fi

wheels=$(value --wheels "$root/benchmarks/wheels" "$@")
site=$(mktemp -d "${TMPDIR:-/tmp}/keras-emr-site.XXXXXX")
trap 'rm -rf "$site"' EXIT
# Only what is missing or too old: another numpy or ml-dtypes than jax was built with may break it.
"$python" - "$wheels" "$root/benchmarks/requirements-gpu.txt" > "$site/missing" << 'END'
import re
import sys
from importlib import metadata
from pathlib import Path


def numbers(version):
    return [int(part) for part in re.findall(r"\d+", version)[:3]]


lines = Path(sys.argv[2]).read_text().splitlines()
least = dict(line.split(">=") for line in lines if ">=" in line)
for wheel in sorted(Path(sys.argv[1]).glob("*.whl")):
    name = wheel.name.split("-")[0].replace("_", "-").lower()
    try:
        there = metadata.version(name)
    except metadata.PackageNotFoundError:
        there = "0"
    if numbers(there) < numbers(least.get(name, "0.0")):
        print(wheel)
END
if [[ -s $site/missing ]]; then
  "$python" -m pip install -q --no-index --no-deps --no-compile --no-cache-dir \
    --disable-pip-version-check --target "$site/packages" -r "$site/missing"
fi
# keras_emr itself from the checkout: no dependency of it, tensorflow among them, is asked for.
export PYTHONPATH="$site/packages:$root:$root/cli:$root/serving${PYTHONPATH:+:$PYTHONPATH}"
cd "$root"
"$python" benchmarks/gpu_stages.py "$@"
