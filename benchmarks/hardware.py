"""What a measurement was made on."""

import os
import platform
import subprocess
from importlib import metadata
from pathlib import Path

PACKAGES = (
    "keras-emr",
    "keras",
    "numpy",
    "tensorflow",
    "jax",
    "jaxlib",
    "torch",
    "torchattacks",
    "adversarial-robustness-toolbox",
)


def describe():
    """Processor, cores, GPUs, versions of everything, the commit of this repository."""
    versions = {"python": platform.python_version()}
    for package in PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    allowed = getattr(os, "sched_getaffinity", None)
    return {
        "cpu": _cpu(),
        "cores": len(allowed(0)) if allowed else os.cpu_count(),
        "gpus": gpus(),
        "system": platform.platform(),
        "versions": versions,
        "commit": _commit(),
    }


def gpus():
    """Names of the NVIDIA GPUs, by ``nvidia-smi``."""
    told = _output("nvidia-smi", "--query-gpu=name", "--format=csv,noheader")
    return [line.strip() for line in (told or "").splitlines()]


def _cpu():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _commit():
    """Of the code that was run, with ``+`` where it differs from it; ``None`` outside git."""
    here = str(Path(__file__).parent)
    commit = _output("git", "-C", here, "rev-parse", "HEAD")
    changed = _output("git", "-C", here, "status", "--porcelain", "-uno")
    return commit and commit.strip() + ("+" if changed else "")


def _output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
