"""``python -m tests``: the default tests, what depends on the backend once per backend.

Two processes at a time, each on one thread: networks this small gain nothing from more. Further
arguments go to pytest, e.g. ``python -m tests -m slow``; then one process at a time, unbridled.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

HERE = Path(__file__).parent
PER_BACKEND = ("attacks", "defenses", "evaluation", "golden", "models", "regularizers", "training")
THREADS = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
# Half of JAX's time is XLA's, on functions that run once or twice; this nearly halves the whole.
# The pinned jaxlib knows the flag; one that does not would abort.
PLAIN_XLA = "--xla_cpu_use_fusion_emitters=false"
NOTHING_SELECTED = 5


def run(backend, folders, arguments, threads):
    """Exit code and output of one pytest process."""
    print(f"-- {backend}: {' '.join(folders)} ...", flush=True)
    command = [sys.executable, "-m", "pytest", *(str(HERE / f) for f in folders), *arguments]
    environment = {**os.environ, **threads, "KERAS_BACKEND": backend}
    if backend == "jax" and threads:
        environment.setdefault("XLA_FLAGS", PLAIN_XLA)
    done = subprocess.run(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    return done.returncode, f"== {backend}: {' '.join(folders)}\n{done.stdout}"


def main():
    default = not sys.argv[1:]
    arguments = ["-q", "-m", "not slow and not gpu"] if default else sys.argv[1:]
    at_once, threads = (min(2, os.cpu_count() or 1), THREADS) if default else (1, {})
    folders = {p.name for p in HERE.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    per_backend = [f for f in PER_BACKEND if f in folders]
    rest = sorted(folders - set(per_backend) - {"cli"})
    # The longest first.
    jobs = [("jax", per_backend), ("tensorflow", ["cli"]), ("tensorflow", per_backend)]
    jobs += [("tensorflow", rest), ("torch", per_backend)]
    codes = []
    with ThreadPoolExecutor(at_once) as pool:
        for done in as_completed([pool.submit(run, *job, arguments, threads) for job in jobs]):
            code, output = done.result()
            print(output, flush=True)
            codes.append(code)
    sys.exit(next((code for code in codes if code not in (0, NOTHING_SELECTED)), 0))


if __name__ == "__main__":
    main()
