"""Trains in child processes that are killed, with signal 9, at random moments of their training.

``kill_worker.py METHOD FOLDER KILLS SEED``: trains FOLDER/whole without a stop, then FOLDER/parts
with KILLS kills, saving after every step; prints as JSON where the kills found the run. The parent
has imported all and computed nothing, so that a child can be forked.
"""

import json
import os
import signal
import sys
import time
from pathlib import Path

import keras
import numpy as np

from tests.resume import runs

N, EPOCHS = 360, 16


class Begun(keras.callbacks.Callback):
    """Says through a pipe that the first step of this process is done.

    Then takes ``pause`` seconds a step: on a fast machine the run would end before its kills.
    """

    def __init__(self, pipe, pause):
        super().__init__()
        self.pipe, self.pause = pipe, pause

    def on_train_batch_end(self, batch, logs=None):
        time.sleep(self.pause)
        if self.pipe is not None:
            os.write(self.pipe, b"!")
            self.pipe = None


def child(method, folder, every, pause=0.0):
    """``(process id, pipe)`` of a process that trains, or resumes, ``folder``."""
    read, write = os.pipe()
    pid = os.fork()
    if pid:
        os.close(write)
        return pid, read
    try:
        robust = runs.classifier(method)
        options = {"n": N, "epochs": EPOCHS, "batch_size": 8, "checkpoint_every": every}
        runs.train(robust, folder, resume=True, callbacks=[Begun(write, pause)], **options)
        code = 0
    except BaseException as error:
        print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
        code = 1
    os._exit(code)


def finish(pid, pipe):
    _, status = os.waitpid(pid, 0)
    os.close(pipe)
    return status


def main():
    method, folder, kills, seed = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), sys.argv[4]
    rng = np.random.default_rng(int(seed))
    began = time.monotonic()
    assert finish(*child(method, folder / "whole", "2h")) == 0
    parts, found = folder / "parts", []
    while len(found) < kills:
        pid, pipe = child(method, parts, "1steps", pause=0.03)
        if len(found) % 5:  # one in five at any moment of its start: loading, compiling, warming up
            os.read(pipe, 1)
            time.sleep(rng.uniform(0, 1))
        else:
            time.sleep(rng.uniform(0, 5))
        os.kill(pid, signal.SIGKILL)
        status = finish(pid, pipe)
        assert os.WIFSIGNALED(status), f"ended by itself after {len(found)} kills: {status}"
        names = sorted(p.name for p in (parts / "checkpoints").glob("*")) if parts.exists() else []
        found.append(names)
    assert finish(*child(method, parts, "7steps")) == 0
    print(json.dumps({"found": found, "seconds": round(time.monotonic() - began)}))


if __name__ == "__main__":
    main()
