"""Options of ``peers.py``: what a party is told, by file and by environment."""

import argparse
from fractions import Fraction
from pathlib import Path

import hardware
from training_parties import NAMES

JOBS = ("standard", "at", "trades", "mart", "at-emr", "at-lstm")
# image, epsilon, batch on a CPU, batch on a GPU
_MODELS = {
    "small-cnn": ((28, 28, 1), 0.3, 128, 128),
    "resnet18": ((32, 32, 3), 8 / 255, 16, 128),
    "wide-resnet": ((32, 32, 3), 8 / 255, 2, 128),
}


def parse(description, arguments=None):
    """The options, with everything that was left open filled in."""
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("--model", default="small-cnn", help="or resnet18, wide-resnet-34-10")
    parser.add_argument("--parties", default=",".join(NAMES))
    parser.add_argument("--jobs", default=",".join(JOBS))
    parser.add_argument("--data", help="FILE.npz or MNIST folder; otherwise random images")
    parser.add_argument("--image", help="HxWxC of the random images")
    parser.add_argument("--batch-size", type=int)
    parser.add_argument("--batches", type=int, default=4, help="different ones")
    parser.add_argument("--steps", type=int, default=10, help="of the attack")
    parser.add_argument("--epsilon", type=_number, help="0.3 or 8/255")
    parser.add_argument("--step-size", type=_number, help="otherwise 2.5 epsilon / steps")
    parser.add_argument(
        "--attack-precision",
        choices=("float32", "bfloat16"),
        default="float32",
        help="of ours and of pytorch-best; the others have no such option",
    )
    parser.add_argument("--rounds", type=int, default=10, help="0: only the check")
    parser.add_argument("--warm-up", type=int, default=2, help="rounds of one step, not counted")
    parser.add_argument("--turn", type=float, default=0.5, help="seconds, of the fastest party")
    parser.add_argument("--tolerance", type=float, default=0.03, help="of the check, relative")
    parser.add_argument("--no-check", action="store_true", help="time also what differs")
    parser.add_argument("--threads", type=int, help="cores that a party may use; otherwise all")
    parser.add_argument("--device", choices=("auto", "cpu", "gpu"), default="auto")
    parser.add_argument("--compile", action="store_true", help="pytorch-best: torch.compile on CPU")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--markdown", type=Path)
    given = vars(parser.parse_args(arguments))
    for field, known in (("parties", NAMES), ("jobs", JOBS)):
        given[field] = given[field].split(",")
        if unknown := set(given[field]).difference(known):
            parser.error(f"--{field}: {', '.join(sorted(unknown))} not among {', '.join(known)}")
    given["parties"].sort(key=NAMES.index)  # the first is whom the others are compared with
    family = "wide-resnet" if given["model"].startswith("wide-resnet-") else given["model"]
    if family not in _MODELS or given["model"].endswith("-emr"):
        parser.error(f"--model: {given['model']} has no PyTorch twin; see --help")
    return settle(given, _MODELS[family], parser.error)


def settle(given, model, error):
    """Add what depends on the model and on the machine."""
    image, epsilon, on_cpu, on_gpu = model
    found = hardware.gpus()
    if given["device"] == "gpu" and not found:
        error("--device gpu: nvidia-smi shows none")
    given["device"] = "gpu" if found and given["device"] != "cpu" else "cpu"
    given["batch_size"] = given["batch_size"] or (on_gpu if given["device"] == "gpu" else on_cpu)
    given["image"] = [int(s) for s in given["image"].split("x")] if given["image"] else image
    given["epsilon"] = epsilon if given["epsilon"] is None else given["epsilon"]
    given["step_size"] = given["step_size"] or 2.5 * given["epsilon"] / given["steps"]
    constants = {"learning_rate": 0.01, "momentum": 0.9}
    return given | constants | {"trades_beta": 6.0, "mart_beta": 5.0, "emr": 0.01}


def _number(text):
    return float(Fraction(text))


def environment(options, name):
    """What a party's process is told by its environment."""
    # TensorFlow and JAX would each take the whole memory of a GPU that all parties share.
    found = {"TF_FORCE_GPU_ALLOW_GROWTH": "true", "XLA_PYTHON_CLIENT_PREALLOCATE": "false"}
    found["TQDM_DISABLE"] = "1"
    if options["device"] == "cpu" or name == "prepare":
        found |= {"CUDA_VISIBLE_DEVICES": "-1", "JAX_PLATFORMS": "cpu"}
    if options["threads"]:
        found["OMP_NUM_THREADS"] = str(options["threads"])
    if name == "pytorch-best":  # as session.select_backend has them for ours on torch
        found["MALLOC_TRIM_THRESHOLD_"] = str(2**31 - 1)
        found["MALLOC_MMAP_THRESHOLD_"] = str(2**25)
    return found
