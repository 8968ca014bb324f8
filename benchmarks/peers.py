"""Adversarial training steps of keras_emr and of its peers, side by side in one run.

    pip install ".[jax,torch]" -r benchmarks/requirements-peers.txt
    python benchmarks/peers.py --model small-cnn [--json OUT] [--markdown OUT]

Parties, a process each: ours on `tensorflow`, `jax` and `torch`; `pytorch`, a plain loop after the
papers' formulas (`torch_loops.py`); `pytorch-best`, the same with the channels last and the C
library's settings of our command line, on a GPU also bfloat16, torch.compile, cuDNN's search and a
fused optimizer, and with `--attack-precision bfloat16` its attack by autocast, as ours has it;
`torchattacks`, its attacks in that loop; `art`, ART's trainers. What is not
installed is left out and named.

Same work, and checked: all parties start from one network, which has learned a little (the twins'
logits are compared with Keras's), and see the same batches. With learning rate 0 the mean outer
loss of `--batches` batches, and EMR's mean penalty, must be those of ours on tensorflow: within
`--tolerance`, or within 4 standard errors of the difference (attacks start at random; in TRADES the
start decides which way an image goes: `--batches 16` tells more) but never more than 10 times the
tolerance. Else the job is not timed and the exit code is 1 (`--no-check`: only told). There is no
dropout. Then the parties take turns, `--rounds` times; a turn is as many steps as the fastest party
makes in `--turn` seconds.
"""

import json
import math
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from tempfile import TemporaryDirectory

import hardware
import numpy as np
import parties
import peers_tables as tables
from peers_options import environment, parse

from keras_emr.evaluation.timing import in_turns, quartiles

# Work of a library that is not quite the others', by party and job; True: the loss differs for it.
_DIFFERENCES = {
    ("pytorch", "trades"): (
        False,
        "one clean pass for the attack and one for the loss; the authors' code makes one more in "
        "every step of the attack",
    ),
    ("torchattacks", "mart"): (True, "its PGD starts uniformly in the ball, not at x + 0.001 n"),
    ("art", "at"): (
        False,
        "computes the weights' gradients in every step of the attack, and predicts the batch twice "
        "more for the attack's success rate",
    ),
    ("art", "trades"): (
        True,
        "its trainer is given PGD on cross-entropy from a uniform start, as it has no attack on "
        "the divergence; weights' gradients and success rate as in at",
    ),
    ("pytorch-best", "at-emr"): (False, "EMR's pass is never compiled, nor in bfloat16"),
}
_GENERAL = (
    "ours goes through train_on_batch, and in at, at-emr and at-lstm makes one more inference pass "
    "for the clean accuracy in its logs",
    "float32, with TF32 where a framework uses it unasked; images start on the host",
    "every attack sees the network in inference mode",
)


def tell(text):
    print(text, file=sys.stderr, flush=True)


def gather(options, folder):
    """Start everyone. Returns ``{name: process}``, ``{name: why it is left out}``."""
    here = Path(__file__).with_name("training_parties.py")

    def start(name):
        return parties.start([here, name, folder], name, **environment(options, name))

    def write():
        (folder / "options.json").write_text(json.dumps(options, default=str))

    write()
    maker = start("prepare")
    made = parties.ask(maker)
    parties.stop([maker])
    if "error" in made:
        raise SystemExit(f"cannot prepare {options['model']}: {made['error']}")
    options |= made
    write()
    tell("the network's head start: {steps} steps, loss {loss:.2f}".format(**made["head_start"]))
    left_out, present = {}, {}
    for name in options["parties"]:
        if absent := parties.missing(name):
            left_out[name] = f"{' and '.join(absent)} not installed"
        else:
            present[name] = start(name)
    wanted = np.load(folder / "given.npz")["logits"]
    for name, process in list(present.items()):
        said = parties.ask(process)
        if "error" in said:
            left_out[name] = f"cannot start: {said['error']}"
        elif options["device"] == "gpu" and not said["gpu"]:
            left_out[name] = "its framework sees no GPU"
        else:
            compare(name, np.array(said["logits"]), wanted, 0.02 if said["gpu"] else 1e-3)
            continue
        parties.stop([present.pop(name)])
    for name, reason in left_out.items():
        tell(f"left out: {name}: {reason}")
    return present, left_out


def compare(name, logits, wanted, tolerance):
    """End the run where a party's network is not the others'. Logits of variance one."""
    apart = float(np.abs(logits - wanted).max())
    if not apart <= tolerance:
        raise SystemExit(f"{name}: logits {apart:.2g} from Keras's, more than {tolerance}")


def check(job, processes, options):
    """Losses of a job by party, with ``agrees`` and, of what is not there, ``why``."""
    found = {}
    for name, process in processes.items():
        row = found[name] = parties.ask(process, json.dumps({"do": "check", "job": job}))
        if "losses" not in row:
            row["why"] = row.get("unsupported") or row["error"]
            tell(f"{job} {name}: {row['why']}")
            continue
        first = next(r for r in found.values() if "losses" in r)
        allowed = options["tolerance"] * (3 if "best" in name and options["device"] == "gpu" else 1)
        row["apart"] = {
            key: apart(row[key], first[key])
            for key in ("losses", "penalties")
            if first[key] and row[key]
        }
        row["agrees"] = all(
            abs(difference) <= min(max(allowed, 4 * error), 10 * allowed)
            for difference, error in row["apart"].values()
        )
        row["excused"] = _DIFFERENCES.get((name, job), (False,))[0]
        verdict = "" if row["agrees"] else " DIFFERS: see notes" if row["excused"] else " DIFFERS"
        took = f"first step {row['first_seconds']:.1f} s"
        tell(f"{job} {name}: loss {np.mean(row['losses']):.4f}, {took}{verdict}")
    return found


def apart(found, wanted):
    """Relative difference of two means over the same batches, and its standard error."""
    scale = float(np.mean(wanted))
    differences = (np.array(found) - np.array(wanted)) / scale
    if not np.isfinite(differences).all():
        return math.inf, 0.0
    error = np.std(differences, ddof=1) / math.sqrt(len(differences)) if len(found) > 1 else 0.0
    return float(np.mean(differences)), float(error)


def measure(job, processes, options):
    """``{name: {"seconds": [...], ...}}``: seconds of a step in each round."""

    def turn(process, steps):
        def take():
            told = parties.ask(process, json.dumps({"do": "time", "steps": steps}))
            if "seconds" not in told:
                raise SystemExit(f"{process.party}, {job}: {told['error']}")
            last[process] = told["loss"]
            return told["seconds"]

        return take

    last = {}
    warm = in_turns([turn(p, 1) for p in processes.values()], max(1, options["warm_up"]), 0)
    steps = max(1, math.ceil(options["turn"] / min(float(times.min()) for times in warm)))
    jobs = [turn(p, steps) for p in processes.values()]
    times = in_turns(jobs, options["rounds"], 0, lambda i, n: tell(f"{job}: round {i}/{n}"))
    rows = zip(processes.items(), times, strict=True)
    return {
        name: {"seconds": t.tolist(), "steps": steps, "last_loss": last[p], **quartiles(t)}
        for (name, p), t in rows
    }


def relate(rows):
    """Add the ratios of each round, to ours on tensorflow and to the fastest peer."""
    peers = [name for name in rows if name not in parties.OURS]
    fastest = min(peers, key=lambda name: rows[name]["median"], default=None)
    for row in rows.values():
        for key, base in (("to_tensorflow", "tensorflow"), ("to_fastest_peer", fastest)):
            if base in rows:
                ratio = np.array(row["seconds"]) / np.array(rows[base]["seconds"])
                row[key] = {"of": base, **quartiles(ratio)}


def notes(options, left_out, checks):
    found = [f"left out: {name}: {reason}" for name, reason in left_out.items()]
    for job, rows in checks.items():
        for name, row in rows.items():
            if "why" in row:
                found.append(f"{name}, {job}: {row['why']}")
            elif (name, job) in _DIFFERENCES:
                found.append(f"{name}, {job}: {_DIFFERENCES[name, job][1]}")
    if options["attack_precision"] != "float32":
        found.append("attacked in bfloat16: ours and pytorch-best; the other parties in float32")
    if options["device"] == "cpu":
        compiled = "" if options["compile"] else ", torch.compile (--compile)"
        found.append(
            "on the CPU; left out: the same on a GPU, and with it pytorch-best's bfloat16"
            + compiled
        )
    return [*found, *_GENERAL]


def run(options, folder):
    began = datetime.now(UTC).isoformat(timespec="seconds")
    processes, left_out = gather(options, folder)
    if not processes:
        raise SystemExit("no party is left")
    checks, times = {}, {}
    for job in options["jobs"]:
        rows = checks[job] = check(job, processes, options)
        able = {n: p for n, p in processes.items() if "losses" in rows[n]}
        wrong = [n for n in able if not (rows[n]["agrees"] or rows[n]["excused"])]
        if able and options["rounds"] and (options["no_check"] or not wrong):
            times[job] = measure(job, able, options)
            relate(times[job])
        for process in processes.values():
            parties.ask(process, json.dumps({"do": "drop"}))
    parties.stop(processes.values())
    return {
        "began": began,
        "options": options,
        "hardware": hardware.describe(),
        "left_out": left_out,
        "notes": notes(options, left_out, checks),
        "check": checks,
        "times": times,
        "unstable": tables.unstable(times, options["rounds"]),
    }


def main():
    options = parse(__doc__.split("\n")[0])
    outputs = {name: options.pop(name) for name in ("json", "markdown")}  # no part of the record
    start = time.monotonic()
    with TemporaryDirectory() as folder:
        result = run(options, Path(folder))
    result["wall_seconds"] = round(time.monotonic() - start, 1)
    text = tables.markdown(result)
    print(text)
    if outputs["json"]:
        outputs["json"].write_text(json.dumps(result, indent=1, default=str) + "\n")
    if outputs["markdown"]:
        outputs["markdown"].write_text(text + "\n")
    wrong = [f"{n}, {j}" for j, n in tables.disagreements(result["check"])]
    for which in wrong:
        tell(f"the check failed: {which}")
    if wrong and not options["no_check"]:
        sys.exit(1)


if __name__ == "__main__":
    main()
