"""The process of a party of ``peers.py``: ``training_parties.py NAME FOLDER``.

``FOLDER`` holds ``options.json``; the party ``prepare`` writes the rest there. A party has
``images`` (the batches in its own layout), ``logits()`` and ``trainer(job)``: an object with
``restart(learning_rate)`` and ``step(x, y) -> {"loss": ..., "penalty": ...}``.
"""

import gc
import importlib
import json
import os
import sys
import time
from pathlib import Path

import numpy as np
import parties

_HOME = {
    **dict.fromkeys(parties.OURS, "our_party:Ours"),
    "pytorch": "peer_parties:PyTorch",
    "pytorch-best": "peer_parties:PyTorchBest",
    "torchattacks": "peer_parties:Torchattacks",
    "art": "peer_parties:Art",
}
NAMES = tuple(_HOME)


class Desk:
    """Answers ``{"do": "check" | "time" | "drop", ...}``."""

    def __init__(self, party, options, labels):
        self.party, self.options, self.labels = party, options, labels
        self.trainer, self.turn = None, 0

    def __call__(self, line):
        request = json.loads(line)
        try:
            return getattr(self, request.pop("do"))(**request)
        except Exception as error:  # of any library
            kind = "unsupported" if type(error).__name__ == "Unsupported" else "error"
            return {kind: str(error) if kind == "unsupported" else _one_line(error)}

    def _step(self):
        i = self.turn % len(self.labels)
        self.turn += 1
        return self.trainer.step(self.party.images[i], self.labels[i])

    def check(self, job):
        """Losses and penalties of all batches at the initial weights; time of the first step."""
        self.trainer, self.turn = self.party.trainer(job), 0
        self.trainer.restart(0.0)
        began = time.perf_counter()
        rows = [self._step()]
        seconds = time.perf_counter() - began
        rows += [self._step() for _ in self.labels[1:]]
        self.trainer.restart(self.options["learning_rate"])
        penalties = [row["penalty"] for row in rows if row["penalty"] is not None]
        return {
            "losses": [row["loss"] for row in rows],
            "penalties": penalties or None,
            "first_seconds": seconds,
        }

    def time(self, steps):
        """Mean seconds of a training step, and the last loss."""
        self.party.wait()
        began = time.perf_counter()
        for _ in range(steps):
            loss = self._step()["loss"]
        self.party.wait()
        return {"seconds": (time.perf_counter() - began) / steps, "loss": loss}

    def drop(self):
        """Make room for the next job."""
        self.trainer = None
        gc.collect()
        return {}


def _one_line(error):
    return f"{type(error).__name__}: {(str(error).strip() or 'no message').splitlines()[0]}"


def main():
    name, folder = sys.argv[1], Path(sys.argv[2])
    options = json.loads((folder / "options.json").read_text())
    if options["threads"] and hasattr(os, "sched_setaffinity"):
        # Every library counts the cores that it may use; not all read OMP_NUM_THREADS.
        allowed = sorted(os.sched_getaffinity(0))
        os.sched_setaffinity(0, allowed[: options["threads"]])

    def ready():
        try:
            if name == "prepare":
                return importlib.import_module("our_party").prepare(options, folder), None
            given = dict(np.load(folder / "given.npz"))
            module, attribute = _HOME[name].split(":")
            party = getattr(importlib.import_module(module), attribute)
            party = party(name, options, folder, given)
            said = {"logits": party.logits().astype(float).tolist(), "gpu": party.on_gpu()}
            return said, Desk(party, options, given["y"])
        except Exception as error:  # a package that is there but cannot be imported, say
            return {"error": _one_line(error)}, None

    parties.serve(ready)


if __name__ == "__main__":
    main()
