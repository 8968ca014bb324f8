"""``python -m tests``: the default tests, what depends on the backend once per backend.

Further arguments go to pytest, e.g. ``python -m tests -m slow``.
"""

import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
BACKENDS = ("tensorflow", "jax", "torch")
PER_BACKEND = ("attacks", "defenses", "evaluation", "golden", "models", "regularizers", "training")


def run(backend, folders, arguments):
    print(f"== {backend}: {' '.join(folders)}", flush=True)
    command = [sys.executable, "-m", "pytest", *(str(HERE / f) for f in folders), *arguments]
    return subprocess.run(command, env={**os.environ, "KERAS_BACKEND": backend}).returncode


def main():
    arguments = sys.argv[1:] or ["-q", "-m", "not slow and not gpu"]
    folders = {p.name for p in HERE.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    per_backend = [f for f in PER_BACKEND if f in folders]
    once = sorted(folders - set(per_backend))
    codes = [run(backend, per_backend, arguments) for backend in BACKENDS]
    codes.append(run("tensorflow", once, arguments))
    # 5: every test of that part was deselected.
    sys.exit(next((code for code in codes if code not in (0, 5)), 0))


if __name__ == "__main__":
    main()
