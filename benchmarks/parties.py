"""Parties of a comparison: a process each, so that none disturbs another; told what to do by line.

A party says one thing about itself when it is ready; then it answers each line on its stdin with
one line of JSON.
"""

import importlib.util
import json
import os
import subprocess
import sys

OURS = ("tensorflow", "jax", "torch")
# What must be importable for a party of that name.
_NEEDS = {
    "pytorch": ("torch",),
    "pytorch-best": ("torch",),
    "torchattacks": ("torch", "torchattacks"),
    "art": ("torch", "art"),
    "foolbox": ("torch", "foolbox"),
}


def missing(name):
    """Packages that the party needs and that are not installed."""
    return [p for p in _NEEDS.get(name, (name,)) if importlib.util.find_spec(p) is None]


def start(command, name, **environment):
    """The process of a party: ``command`` run by this Python, on the party's Keras backend."""
    environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **environment}
    environment["KERAS_BACKEND"] = name if name in OURS else "torch"
    process = subprocess.Popen(
        [sys.executable, *command],
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    process.party = name
    return process


def ask(process, request=None):
    """The answer to a line, or what the party says first. Ends the run if the party has ended."""
    if request:
        process.stdin.write(request + "\n")
        process.stdin.flush()
    line = process.stdout.readline()
    if not line:
        raise SystemExit(f"{process.party} ended while doing {request!r}")
    return json.loads(line)


def stop(processes):
    """End parties: nothing more will be asked."""
    for process in processes:
        process.stdin.close()
    for process in processes:
        process.wait()


def serve(prepare):
    """A party's side of it.

    Args:
        prepare: returns what to say first, and the function from a line to its answer.
    """
    out = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # libraries chat, some of them from C
    said, answer = prepare()
    print(json.dumps(said), file=out, flush=True)
    for line in sys.stdin:
        print(json.dumps(answer(line.strip())), file=out, flush=True)
