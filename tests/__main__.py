"""``python -m tests``: the default tests, what depends on the backend once per backend.

Two processes at a time, each on one thread: networks this small gain nothing from more. Further
arguments go to pytest, e.g. ``python -m tests -m slow``.
"""

import os
import re
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tests.processes import environment

HERE = Path(__file__).parent
PER_BACKEND = (("training", "models", "resume"), ("golden", "evaluation", "blackbox"))
ALONE = ("system", "cli", "serving")  # once, each in a process of its own
THREADS = {"OMP_NUM_THREADS": "1", "TF_NUM_INTRAOP_THREADS": "1", "TF_NUM_INTEROP_THREADS": "1"}
NOTHING_SELECTED = 5


def run(backend, folders, arguments):
    """Exit code and output of one pytest process."""
    print(f"-- {backend}: {' '.join(folders)} ...", flush=True)
    command = [sys.executable, "-m", "pytest", *(str(HERE / f) for f in folders), *arguments]
    done = subprocess.run(
        command,
        env=environment(backend, **THREADS),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    return done.returncode, f"== {backend}: {' '.join(folders)}\n{done.stdout}"


def total(outputs, seconds):
    """One line in pytest's words over all processes: theirs, each for itself, misread easily."""
    counts = Counter()
    for output in outputs:
        summary = re.findall(r"^=*\s*(\d+ \w+.*) in [\d.]+s.*$", output, re.M)[-1:]
        for count, kind in re.findall(r"(\d+) ([a-z]+)", " ".join(summary)):
            counts[{"error": "errors", "warning": "warnings"}.get(kind, kind)] += int(count)
    order = ("failed", "errors", "passed", "skipped", "xfailed", "deselected", "warnings")
    said = ", ".join(f"{counts[kind]} {kind}" for kind in order if counts[kind])
    return f"{said or 'no tests ran'} in {seconds:.2f}s"


def main():
    arguments = sys.argv[1:] or ["-q", "-m", "not slow and not gpu"]
    folders = {p.name for p in HERE.iterdir() if p.is_dir() and any(p.glob("test_*.py"))}
    once = sorted(folders.difference(ALONE, *PER_BACKEND))
    learning, judging = (list(group) for group in PER_BACKEND)
    # The longest first.
    jobs = [
        *(("tensorflow", [folder]) for folder in ALONE),
        ("jax", judging),
        ("tensorflow", once),
        ("tensorflow", learning),
        ("jax", learning),
        ("tensorflow", judging),
        ("torch", learning + judging),
    ]
    start, codes, outputs = time.monotonic(), [], []
    with ThreadPoolExecutor(min(2, os.cpu_count() or 1)) as pool:
        for done in as_completed([pool.submit(run, *job, arguments) for job in jobs]):
            code, output = done.result()
            print(output, flush=True)
            codes.append(code)
            outputs.append(output)
    print(f"== all\n{total(outputs, time.monotonic() - start)}", flush=True)
    failed = next((code for code in codes if code not in (0, NOTHING_SELECTED)), 0)
    sys.exit(failed or (NOTHING_SELECTED if set(codes) == {NOTHING_SELECTED} else 0))


if __name__ == "__main__":
    main()
