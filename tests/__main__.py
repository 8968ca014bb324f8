"""``python -m tests``: the default tests, what depends on the backend once per backend.

As many processes at a time as there are cores, up to two, each on one thread: networks this small
gain nothing from more. Further arguments go to pytest, e.g. ``python -m tests -m slow``.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent
PER_BACKEND = ("attacks", "defenses", "evaluation", "golden", "models", "regularizers", "training")
THREADS = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
NOTHING_SELECTED = 5


def run(backend, folders, arguments):
    """Exit code and output of one pytest process."""
    command = [sys.executable, "-m", "pytest", *(str(HERE / f) for f in folders), *arguments]
    environment = {**os.environ, **THREADS, "KERAS_BACKEND": backend}
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, f"== {backend}: {' '.join(folders)}\n{done.stdout}"


def main():
    arguments = sys.argv[1:] or ["-q", "-m", "not slow and not gpu"]
    folders = {p.name for p in HERE.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    per_backend = [f for f in PER_BACKEND if f in folders]
    rest = sorted(folders - set(per_backend) - {"cli"})
    # The longest first.
    jobs = [("jax", per_backend), ("tensorflow", ["cli"]), ("tensorflow", per_backend)]
    jobs += [("tensorflow", rest), ("torch", per_backend)]
    codes = []
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for done in as_completed([pool.submit(run, *job, arguments) for job in jobs]):
            code, output = done.result()
            print(output, flush=True)
            codes.append(code)
    sys.exit(next((code for code in codes if code not in (0, NOTHING_SELECTED)), 0))


if __name__ == "__main__":
    main()
