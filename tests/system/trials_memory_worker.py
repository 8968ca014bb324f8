"""Resident memory while 20 trials are run: prints it in MiB after every trial.

Run with KERAS_BACKEND set, in an empty folder; ``test_memory.py`` reads the list.
"""

import contextlib
import json
import os
import sys

from keras_emr.tuning import trials
from keras_emr_cli.main import main
from tests.cli.harness import write_data
from tests.system.memory_worker import resident

SPACE = """
learning_rate: {type: float, low: 0.001, high: 0.02, sampling: log}
batch_size: [15, 16, 18, 20]
defense: [at, trades]
"""


def run():
    write_data("toy.npz")
    with open("space.yaml", "w") as file:
        file.write(SPACE)
    seen, released = [], trials.memory_released

    @contextlib.contextmanager
    def released_and_looked_at():
        with released():
            yield
        seen.append(round(resident(), 1))

    trials.memory_released = released_and_looked_at
    flags = "--data toy.npz --model mlp --epochs 2 --steps 1 --prune-steps 1 --finalists 0"
    flags += (
        f" --max-trials 20 --stopping none --quiet --out s --backend {os.environ['KERAS_BACKEND']}"
    )
    try:
        main(["tune", "--space", "space.yaml", *flags.split()])
    except SystemExit as stop:
        code = stop.code
    print(json.dumps({"code": code, "resident": seen}), file=sys.stderr)


if __name__ == "__main__":
    run()
