"""The stages of ``benchmarks/gpu.sh``, which says what they are and installs what they need."""

import argparse
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

import hardware

ROOT = Path(__file__).resolve().parents[1]
MINUTES = {"tests": 10, "bench": 20, "peers": 20, "train": 60}
CLI = [sys.executable, "-m", "keras_emr_cli.main"]
JOBS = "at,trades,mart,at-emr,at-lstm"
RECIPE = "recipe:cifar10-at-resnet18"
RESUMABLE = 75  # a training that was stopped in time


class Stage:
    """Runs the commands of one stage, within its time, into its log."""

    def __init__(self, name, options, gpu):
        self.name, self.options, self.gpu, self.out = name, options, gpu, options.out
        self.seconds = 60 * (options.minutes or MINUTES[name])
        self.end = time.monotonic() + self.seconds
        self.said, self.failed = [], []
        self.log = open(self.out / f"{name}.log", "a")

    def say(self, text):
        self.said.append(text)
        print(f"{self.name}: {text}", flush=True)

    def run(self, title, command, share=1.0, fails=True, **environment):
        """Exit code of ``command``, ``None`` if it was stopped; a failure is kept, not raised.

        Args:
            share: of the stage's time that is left.
            environment: of the process; ``None`` takes a variable away.
        """
        left = (self.end - time.monotonic()) * share
        merged = {**os.environ, "PYTHONUNBUFFERED": "1", **environment}
        merged = {name: value for name, value in merged.items() if value is not None}
        print(f"\n$ {' '.join(command)}", file=self.log, flush=True)
        code, began = None, time.monotonic()
        if left > 0:
            child = subprocess.Popen(
                command,
                cwd=ROOT,
                env=merged,
                stdout=self.log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )
            try:
                code = child.wait(left)
            except subprocess.TimeoutExpired:
                code = self._stop(child)
        taken = time.monotonic() - began
        if code == 0:
            self.say(f"{title}: done in {taken:.0f} s")
        elif fails:
            why = "out of time" if code is None else f"exit code {code}"
            self.failed.append(title)
            self.say(f"{title}: FAILED ({why}), see {self.name}.log")
        return code

    @staticmethod
    def _stop(child):
        """SIGTERM, and the exit code of who minds it: trainings write a checkpoint."""
        for number, patience in ((signal.SIGTERM, 60), (signal.SIGKILL, 10)):
            try:
                os.killpg(child.pid, number)
                code = child.wait(patience)
                return code if code == RESUMABLE else None
            except (subprocess.TimeoutExpired, ProcessLookupError):
                continue
        return None


def tests(stage):
    if not stage.gpu:
        stage.say("left out: without a GPU nothing is marked for it")
        return
    # Child processes compare with the CPU; a GPU's memory must do for both.
    given = {"XLA_PYTHON_CLIENT_PREALLOCATE": "false", "JAX_ENABLE_X64": "0"}
    visible = os.environ.get("CUDA_VISIBLE_DEVICES", "0")
    for share, backend in ((0.5, "jax"), (1.0, "torch")):
        command = [sys.executable, "-m", "pytest", "-q", "-m", "gpu", "-p", "no:cacheprovider"]
        command += ["tests/gpu", f"--junitxml={stage.out / f'tests-{backend}.xml'}"]
        given |= {"KERAS_BACKEND": backend, "CUDA_VISIBLE_DEVICES": visible}
        stage.run(backend, command, share, **given)


def bench(stage):
    models = ("small-cnn", "resnet18", "wide-resnet-34-10")
    precisions = [("float32", "float32"), ("mixed_bfloat16", "bfloat16")]
    if not stage.gpu:
        models, precisions = models[:1], precisions[:1]
        stage.say("resnet18, wide-resnet-34-10 and mixed_bfloat16 left out: no GPU")
    for model in models:
        for precision, attacked_in in precisions:
            title = f"{model}, {precision}"
            out = stage.out / f"bench-{model}-{precision}.json"
            shape = "28x28x1" if model == "small-cnn" else "32x32x3"
            words = ["--model", model, "--input-shape", shape, "--backend", "jax"]
            words += ["--precision", precision, "--attack-precision", attacked_in]
            words += ["--epsilon", "0.3" if model == "small-cnn" else "8/255"]
            if stage.gpu:
                words += ["--jobs", JOBS, "--batch-size", "128", "--steps", "10", "--rounds", "5"]
            else:
                words += ["--jobs", "at", "--batch-size", "8", "--steps", "2", "--rounds", "1"]
            words += ["--out", str(out), "--overwrite", "--json", "--quiet"]
            if stage.run(title, [*CLI, "bench", *words]) == 0:
                stage.say(f"{title}: {speeds(json.loads(out.read_text()))}")


def speeds(found):
    """Of a ``keras-emr bench --json``: each job's share of the matrix rate, times the least."""
    rate = f"{found['matrix_flops_per_second'] / 1e12:.3g} TFLOP/s in {found['matrix_precision']}"
    parts = [
        f"{name} {100 * job['share_of_matrix_rate']:.0f} % ({job['measured_over_least']:.2f})"
        for name, job in found["jobs"].items()
    ]
    return f"of the matrix rate, {rate}, and times the least: {', '.join(parts)}"


def peers(stage):
    script = ROOT / "benchmarks" / "peers.py"
    parties, jobs = "jax,torch,pytorch,pytorch-best", "at,trades,mart,at-emr"
    runs = [("small-cnn", 128, 5), ("resnet18", 128, 5)]
    if not stage.gpu:
        parties, jobs, runs = "jax,pytorch", "at", [("small-cnn", 8, 1)]
        stage.say("resnet18, torch, pytorch-best and jobs but at left out: no GPU")
    for model, size, rounds in runs:
        words = ["--model", model, "--batch-size", str(size), "--rounds", str(rounds)]
        words += ["--parties", parties, "--jobs", jobs]
        words += ["--json", str(stage.out / f"peers-{model}.json")]
        words += ["--markdown", str(stage.out / f"peers-{model}.md")]
        stage.run(model, [sys.executable, str(script), *words])


def train(stage):
    options = stage.options
    run = options.run or stage.out / "run"
    if stage.gpu and options.data is None:
        stage.say("left out: no --data (an .npz of CIFAR-10, or what else train takes)")
        return
    resumed = (run / "config.yaml").exists()
    if stage.gpu:
        words = ["--config", RECIPE, "--data", options.data, "--precision", "mixed_bfloat16"]
        words += ["--epochs", str(options.epochs), "--lr-schedule", "cyclic"]
        words += ["--lr-epochs", "auto", "--learning-rate", "0.2"]
        attack = ["--attacks", "autoattack", "--n-examples", str(options.n_examples)]
    else:
        stage.say("CIFAR-10, ResNet-18, AutoAttack and the target left out: no GPU; digits instead")
        words = ["--data", "digits", "--epochs", "1", "--steps", "2", "--no-baseline"]
        words += ["--val-steps", "2"]
        attack = ["--attacks", "pgd", "--steps", "2", "--n-examples", "16"]
        attack += ["--extra-examples", "0"]
    words += ["--eval-steps", "10", "--eval-restarts", "1", "--backend", "jax"]
    words = ["--resume", "--backend", "jax"] if resumed else words
    words += ["--out", str(run), "--json", "--quiet"]
    # A quarter of the time, and what the training leaves of the rest, is the evaluation's.
    code = stage.run("training", [*CLI, "train", *words], 0.75, fails=False)
    stopped = code in (RESUMABLE, None)
    if code not in (0, RESUMABLE, None) or not (run / "best.keras").exists():
        stage.failed.append("training")
        stage.say(f"training: FAILED (exit code {code}), see train.log")
        return
    epochs = len((run / "history.jsonl").read_text().splitlines())
    if stopped:
        stage.say(f"training: stopped in time after {epochs} epochs; the same --run goes on")
    for name in ("config.yaml", "history.jsonl", "environment.json"):
        shutil.copy(run / name, stage.out / f"train-{name}")
    attacked = run / "attacked"  # of an earlier call: maybe another epoch's model
    command = [*CLI, "evaluate", str(run), *attack, "--out", str(attacked), "--overwrite"]
    command += ["--backend", "jax", "--json", "--quiet"]
    if stage.run("evaluation", command) != 0:
        return
    report = attacked / "report.json"
    shutil.copy(report, stage.out / "train-report.json")
    found = robust_accuracy(json.loads(report.read_text()))
    said = f"robust accuracy {found:.4f} after {epochs} epochs"
    if stage.gpu and found < options.target:
        stage.failed.append(f"target {options.target:g}")
        said += f", below the target {options.target:g}: FAILED"
    stage.say(said)


def robust_accuracy(report):
    """Of an evaluation's report: right under every attack."""
    return report["accuracy"]["robust"]


STAGES = {"tests": tests, "bench": bench, "peers": peers, "train": train}


def output(*command):
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=60, cwd=ROOT)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout.strip() if done.returncode == 0 else ""


def environment(commit):
    """Date, hardware with the driver, versions, commit."""
    asked = output("nvidia-smi", "--query-gpu=driver_version,memory.total", "--format=csv,noheader")
    driver, memory = (asked.splitlines() or [","])[0].split(",")
    found = hardware.describe()
    return {
        "date": datetime.now(UTC).strftime("%Y-%m-%d"),
        **found,
        "driver": driver.strip() or None,
        "gpu_memory": memory.strip() or None,
        "commit": commit or found["commit"],
    }


def parse(words):
    parser = argparse.ArgumentParser(prog="gpu.sh", description=__doc__)
    parser.add_argument("--stages", default=",".join(STAGES))
    parser.add_argument("--minutes", type=float)
    parser.add_argument("--data")
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--n-examples", type=int, default=1000)
    parser.add_argument("--target", type=float, default=0.40)
    parser.add_argument("--run", type=Path)
    parser.add_argument("--wheels")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--commit")
    options = parser.parse_args(words)
    options.stages = options.stages.split(",")
    if unknown := sorted(set(options.stages) - set(STAGES)):
        parser.error(f"--stages: unknown {', '.join(unknown)}; there are {', '.join(STAGES)}")
    return options


def summary(known, stages):
    """What ran, on what, as Markdown."""
    gpu = ", ".join(known["gpus"]) or "no GPU"
    versions = ", ".join(f"{name} {version}" for name, version in known["versions"].items())
    lines = [f"# {known['date']}, {gpu}", ""]
    lines += [f"Driver {known['driver']}; {known['cores']} cores; {known['system']}.", ""]
    lines += [f"{versions}; commit {known['commit']}.", "", "| stage | | |", "|---|---|---|"]
    for stage in stages:
        state = f"failed: {', '.join(stage.failed)}" if stage.failed else "ok"
        lines.append(f"| {stage.name} | {state} | {'; '.join(stage.said)} |")
    return "\n".join(lines) + "\n"


def main():
    options = parse(sys.argv[1:])
    known = environment(options.commit)
    gpu = bool(known["gpus"])
    name = re.sub(r"[^a-z0-9]+", "-", (known["gpus"] or ["cpu"])[0].lower()).strip("-")
    options.out = options.out or ROOT / "benchmarks" / "results" / f"{known['date']}-{name}"
    options.out = options.out.resolve()
    options.out.mkdir(parents=True, exist_ok=True)
    options.run = options.run and options.run.resolve()
    (options.out / "environment.json").write_text(json.dumps(known, indent=2) + "\n")
    if not gpu:
        print("no GPU: a small part runs on the CPU", flush=True)
    done = []
    for stage_name in options.stages:
        stage = Stage(stage_name, options, gpu)
        done.append(stage)
        try:
            STAGES[stage_name](stage)
        except Exception as error:  # the other stages are to run
            stage.failed.append(f"{type(error).__name__}: {error}")
            stage.say(f"FAILED ({stage.failed[-1]})")
        (options.out / "summary.md").write_text(summary(known, done))
    failed = [stage.name for stage in done if stage.failed]
    print(f"failed: {', '.join(failed)}" if failed else "all done", f"({options.out})", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
