"""The result of ``peers.py`` as Markdown."""

import math

import numpy as np

FEWEST_ROUNDS = 5
WIDEST_SPREAD = 0.1


def unstable(times, rounds):
    """What not to build upon: ``["at, jax: ...", ...]``."""
    found = []
    if times and rounds < FEWEST_ROUNDS:
        found.append(f"every time: {rounds} rounds, fewer than {FEWEST_ROUNDS}")
    for job, rows in times.items():
        for name, row in rows.items():
            spread = (row["high"] - row["low"]) / row["median"]
            if spread > WIDEST_SPREAD:
                found.append(f"{job}, {name}: quartiles {100 * spread:.0f} % of the median apart")
            if not math.isfinite(row["last_loss"]):
                found.append(f"{job}, {name}: trained until its loss was not finite")
    return found


def disagreements(checks):
    """``[(job, party), ...]`` whose loss is not the others', without a reason."""
    return [
        (job, name)
        for job, rows in checks.items()
        for name, row in rows.items()
        if "agrees" in row and not (row["agrees"] or row["excused"])
    ]


def markdown(result):
    o, machine, jobs = result["options"], result["hardware"], list(result["check"])
    names = [n for n in o["parties"] if n not in result["left_out"]]
    shape = "x".join(str(side) for side in o["shape"])
    device = ", ".join(machine["gpus"]) if o["device"] == "gpu" else machine["cpu"]
    head = (
        f"{o['model']}, {shape}, batch {o['batch_size']}, PGD-{o['steps']}, epsilon "
        f"{o['epsilon']:.4g}, step {o['step_size']:.4g}; {o['data'] or 'random images'}; "
        f"{o['rounds']} rounds. {device}, {o['threads'] or machine['cores']} cores. "
        f"{result['began']}, commit {(machine['commit'] or 'unknown')[:12]}."
    )
    packages = ", ".join(f"{name} {version}" for name, version in machine["versions"].items())

    def rows(cell):
        return [[name, *(cell(job, name) for job in jobs)] for name in names]

    def median(job, name):
        row = result["times"].get(job, {}).get(name)
        if row is None:
            return "" if "why" in result["check"][job][name] else "not timed"
        relative = row.get("to_fastest_peer")
        times = f", {relative['median']:.2f}x" if relative else ""
        return f"{_ms(row['median'])} ({_ms(row['low'])}-{_ms(row['high'])}){times}"

    def ratio(job, name):
        row = result["times"].get(job, {}).get(name, {}).get("to_tensorflow")
        return f"{row['median']:.2f} ({row['low']:.2f}-{row['high']:.2f})" if row else ""

    def loss(job, name):
        row = result["check"][job][name]
        if "why" in row:
            return ""
        mark = "" if row["agrees"] else " (other work)" if row["excused"] else " **differs**"
        penalty = f", EMR {np.mean(row['penalties']):.4g}" if row["penalties"] else ""
        difference, error = (100 * part for part in row["apart"]["losses"])
        apart = f" ({difference:+.1f} % +- {error:.1f})" if difference else ""
        return f"{np.mean(row['losses']):.4f}{apart}{penalty}{mark}"

    parts = [
        head,
        packages + ".",
        "Milliseconds of a training step: median (quartiles), times the fastest peer's.",
        _table(["", *jobs], rows(median)),
    ]
    if any("to_tensorflow" in row for job in result["times"].values() for row in job.values()):
        parts += ["Times ours on tensorflow, round by round.", _table(["", *jobs], rows(ratio))]
    parts += [
        f"Outer loss of the same {o['batches']} batches at the initial weights (difference from "
        "the first party's, its standard error).",
        _table(["", *jobs], rows(loss)),
    ]
    if result["unstable"]:
        parts.append("\n".join(["Unstable:", "", *(f"* {u}" for u in result["unstable"])]))
    parts.append("\n".join(["Notes:", "", *(f"* {note}" for note in result["notes"])]))
    return "\n\n".join(parts)


def _ms(seconds):
    return f"{1000 * seconds:.3g}" if seconds < 0.1 else f"{1000 * seconds:.0f}"


def _table(head, rows):
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)
