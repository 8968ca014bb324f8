"""Strength and speed of attacks, side by side with torchattacks, ART and Foolbox.

    pip install ".[torch]" -r benchmarks/requirements-peers.txt
    python benchmarks/attack_peers.py MODEL.keras --data MNIST-FOLDER --epsilon 0.3 [--json OUT]

MODEL is a Sequential of Conv2D, MaxPooling2D, Flatten, Dense and Dropout layers, such as
``keras-emr train --model small-cnn`` makes. Each party works in a process of its own, on the same
weights and test images: ours through Keras on each backend in ``--backends``, the peers on a
native PyTorch twin of the model (NCHW; its logits are compared with Keras's first). The jobs are
done in turns, ``--rounds`` times, so that a busy machine is busy for all of them; the medians are
reported. The first round of ours includes compilation and is told apart.

Same work: PGD-40 (step 0.01 / 0.3 epsilon, uniform start), APGD-CE-100 (one start), Square with
1000 queries, AutoAttack "standard"; minimum-norm attacks by the median distance over the images
that are classified correctly (infinite where nothing is found). torchattacks' AutoAttack makes 10
steps in its APGDs and FAB where the authors and we make 100: "autoattack" takes it as it comes,
"autoattack-100" with the authors' steps. What ART calls AutoAttack is another list: two
untargeted APGDs with 5 starts each, DeepFool, and Square 5 times, which alone takes hours:
"autoattack-no-square" leaves it out.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
import parties

SPEED = ("pgd-40", "apgd-100", "square-1000")
SUITES = ("autoattack", "autoattack-100", "autoattack-no-square")
DISTANCE = ("cw-l2", "deepfool-l2", "fab-l2", "fab-linf")
PEERS = ("torchattacks", "art", "foolbox")


# ---------------------------------------------------------------- ours


class Ours:
    """Keras, whatever KERAS_BACKEND says."""

    def __init__(self, options):
        import keras

        self.model = keras.saving.load_model(options.model, compile=False)
        self.epsilon, self.batch_size = options.epsilon, options.batch_size

    def logits(self, x):
        import keras

        return keras.ops.convert_to_numpy(self.model(x, training=False))

    def robust(self, job, x, y):
        import keras_emr as ke
        from keras_emr.attacks import ATTACKS

        epsilon = self.epsilon
        if job in ("autoattack", "autoattack-100"):
            result = ke.AutoAttack(epsilon).run(self.model, x, y, batch_size=self.batch_size)
            return result.robust
        attack = {
            "pgd-40": lambda: ke.PGD(epsilon, steps=40, step_size=epsilon / 30),
            "apgd-100": lambda: ke.APGD(epsilon, steps=100),
            "square-1000": lambda: ATTACKS.get("square")(epsilon, steps=1000, rescale=True),
        }[job]()
        return ke.evaluate_attack(self.model, attack, x, y, batch_size=self.batch_size).robust

    def distances(self, job, x, y, options):
        from keras_emr.attacks import ATTACKS
        from keras_emr.evaluation.distances import minimum_distances

        attack = {
            "cw-l2": lambda: ATTACKS.get("cw-l2")(iterations=options.cw_iterations),
            "deepfool-l2": lambda: ATTACKS.get("deepfool")(norm="l2"),
            "fab-l2": lambda: ATTACKS.get("fab")(norm="l2"),
            "fab-linf": lambda: ATTACKS.get("fab")(norm="linf"),
        }[job]()
        return minimum_distances(self.model, attack, x, y, batch_size=self.batch_size)


# ---------------------------------------------------------------- peers


def torch_twin(path):
    """The model in native PyTorch, NCHW images to logits."""
    import keras
    import torch

    model = keras.saving.load_model(path, compile=False)
    parts, shape = [], model.input_shape[1:]
    for layer in model.layers:
        kind = type(layer).__name__
        if kind == "Conv2D":
            kernel, bias = (np.asarray(w) for w in layer.get_weights())
            twin = torch.nn.Conv2d(kernel.shape[2], kernel.shape[3], kernel.shape[:2])
            twin.padding = "same" if layer.padding == "same" else (0, 0)
            _fill(twin, kernel.transpose(3, 2, 0, 1), bias)
        elif kind == "MaxPooling2D":
            twin = torch.nn.MaxPool2d(layer.pool_size, layer.strides)
        elif kind == "Flatten":
            parts.append(torch.nn.Flatten())
            flattened = shape
            continue
        elif kind == "Dense":
            kernel, bias = (np.asarray(w) for w in layer.get_weights())
            if flattened is not None:  # rows are in NHWC order
                rows = np.arange(len(kernel)).reshape(flattened).transpose(2, 0, 1).ravel()
                kernel, flattened = kernel[rows], None
            twin = torch.nn.Linear(*kernel.shape)
            _fill(twin, kernel.T, bias)
        elif kind == "Dropout":
            continue
        else:
            raise SystemExit(f"no twin for a {kind} layer")
        shape = layer.output.shape[1:]
        parts.append(twin)
        if kind in ("Conv2D", "Dense") and layer.activation.__name__ == "relu":
            parts.append(torch.nn.ReLU())
    return torch.nn.Sequential(*parts).eval()


def _fill(layer, weight, bias):
    import torch

    with torch.no_grad():
        layer.weight.copy_(torch.from_numpy(np.ascontiguousarray(weight)))
        layer.bias.copy_(torch.from_numpy(bias))


class Peer:
    """A library on the PyTorch twin. Images are NHWC outside, NCHW inside."""

    def __init__(self, options):
        import torch

        self.torch, self.model = torch, torch_twin(options.model)
        self.epsilon, self.batch_size = options.epsilon, options.batch_size
        self.classes = options.classes

    def logits(self, x):
        with self.torch.no_grad():
            return self.model(self._tensor(x)).numpy()

    def _tensor(self, x):
        return self.torch.from_numpy(np.ascontiguousarray(x.transpose(0, 3, 1, 2)))

    def _batches(self, attack, x, y):
        """Images of ``attack(x, y)``, tensors in batches."""
        found = []
        for begin in range(0, len(x), self.batch_size):
            part = slice(begin, begin + self.batch_size)
            labels = self.torch.from_numpy(y[part].astype("int64"))
            found.append(attack(self._tensor(x[part]), labels).detach().numpy())
        return np.concatenate(found).transpose(0, 2, 3, 1)

    def robust(self, job, x, y):
        right = self.logits(x).argmax(1) == y
        found = self.images(job, x, y, None)
        inside = np.abs(found - x).max(axis=(1, 2, 3)) <= self.epsilon + 1e-5
        assert inside.all(), f"{job}: {(~inside).sum()} images outside the ball"
        return right & (self.logits(found).argmax(1) == y)

    def distances(self, job, x, y, options):
        found = self.images(job, x, y, options)
        delta = (found.astype("float64") - x).reshape(len(x), -1)
        size = np.abs(delta).max(1) if job.endswith("linf") else np.linalg.norm(delta, axis=1)
        fooled = self.logits(found).argmax(1) != y
        return np.where(self.logits(x).argmax(1) != y, 0.0, np.where(fooled, size, np.inf))


class Torchattacks(Peer):
    def images(self, job, x, y, options):
        import torchattacks as ta

        eps, model, classes = self.epsilon, self.model, self.classes
        attack = {
            "pgd-40": lambda: ta.PGD(model, eps=eps, alpha=eps / 30, steps=40),
            "apgd-100": lambda: ta.APGD(model, eps=eps, steps=100),
            "square-1000": lambda: ta.Square(model, eps=eps, n_queries=1000),
            "autoattack": lambda: ta.AutoAttack(model, eps=eps, n_classes=classes, seed=0),
            "autoattack-100": lambda: ta.MultiAttack(
                [
                    ta.APGD(model, eps=eps, steps=100),
                    ta.APGDT(model, eps=eps, steps=100, n_classes=classes),
                    ta.FAB(model, eps=eps, steps=100, multi_targeted=True, n_classes=classes),
                    ta.Square(model, eps=eps, n_queries=5000),
                ]
            ),
            "cw-l2": lambda: ta.CW(model, steps=options.cw_iterations),
            "deepfool-l2": lambda: ta.DeepFool(model),
            "fab-l2": lambda: ta.FAB(model, norm="L2", eps=10.0, steps=100),
            "fab-linf": lambda: ta.FAB(model, norm="Linf", eps=1.0, steps=100),
        }[job]()
        return self._batches(attack, x, y)


class Art(Peer):
    def __init__(self, options):
        super().__init__(options)
        from art.estimators.classification import PyTorchClassifier

        loss = self.torch.nn.CrossEntropyLoss()
        shape = tuple(options.shape)
        self.art = PyTorchClassifier(self.model, loss, shape, self.classes, clip_values=(0.0, 1.0))

    def images(self, job, x, y, options):
        from art.attacks import evasion as art

        eps, model, size = self.epsilon, self.art, self.batch_size
        common = {"batch_size": size, "verbose": False}
        ball = {"norm": np.inf, "eps": eps}
        attack = {
            "pgd-40": lambda: art.ProjectedGradientDescentPyTorch(
                model, **ball, eps_step=eps / 30, max_iter=40, num_random_init=1, **common
            ),
            "apgd-100": lambda: art.AutoProjectedGradientDescent(
                model, **ball, eps_step=2 * eps, max_iter=100, nb_random_init=1,
                loss_type="cross_entropy", **common
            ),
            "square-1000": lambda: art.SquareAttack(model, **ball, max_iter=1000, **common),
            "autoattack": lambda: art.AutoAttack(
                model, **ball, eps_step=eps / 4, batch_size=size
            ),
            "autoattack-no-square": lambda: without_square(
                art.AutoAttack(model, **ball, eps_step=eps / 4, batch_size=size)
            ),
            "cw-l2": lambda: art.CarliniL2Method(
                model, max_iter=options.cw_iterations, binary_search_steps=9,
                initial_const=1e-3, **common
            ),
            "deepfool-l2": lambda: art.DeepFool(model, max_iter=50, epsilon=0.02, **common),
        }[job]()  # fmt: skip
        labels = np.eye(self.art.nb_classes, dtype="float32")[y]
        images = np.ascontiguousarray(x.transpose(0, 3, 1, 2))
        return attack.generate(images, labels).transpose(0, 2, 3, 1)


def without_square(suite):
    suite.attacks = [a for a in suite.attacks if type(a).__name__ != "SquareAttack"]
    return suite


class Foolbox(Peer):
    def __init__(self, options):
        super().__init__(options)
        import foolbox

        self.foolbox = foolbox.PyTorchModel(self.model, bounds=(0, 1), device="cpu")

    def images(self, job, x, y, options):
        import foolbox.attacks as fa

        eps = self.epsilon
        attack = {
            "pgd-40": lambda: fa.LinfPGD(abs_stepsize=eps / 30, steps=40),
            "cw-l2": lambda: fa.L2CarliniWagnerAttack(steps=options.cw_iterations),
            "deepfool-l2": lambda: fa.L2DeepFoolAttack(),
        }[job]()
        radius = eps if job == "pgd-40" else None
        return self._batches(lambda a, b: attack(self.foolbox, a, b, epsilons=radius)[1], x, y)


# ---------------------------------------------------------------- one process per party


def ready(options):
    """What the party says first, its logits, and how it does the jobs that arrive."""
    kinds = {"torchattacks": Torchattacks, "art": Art, "foolbox": Foolbox}
    party = kinds.get(options.serve, Ours)(options)
    given = np.load(options.arrays)
    x, y = given["x"], given["y"]

    def do(job):
        began = time.perf_counter()
        try:
            if job in DISTANCE:
                part = slice(0, options.n_distance)
                found = party.distances(job, x[part], y[part], options)
                told = {"median": float(np.median(found)), "found": int(np.isfinite(found).sum())}
            else:
                told = {"robust": float(party.robust(job, x, y).mean())}
            told["seconds"] = time.perf_counter() - began
        except KeyError:
            told = None  # the library has no such attack
        return told

    return party.logits(x[:20]).astype(float).tolist(), do


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--data", required=True)
    parser.add_argument("--epsilon", type=float, default=0.3)
    parser.add_argument("--n", type=int, default=500)
    parser.add_argument("--n-distance", type=int, default=200)
    parser.add_argument("--cw-iterations", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=250)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--backends", default="tensorflow")
    parser.add_argument("--peers", default=",".join(PEERS))
    # Whole suites only by name: ART's takes hours.
    parser.add_argument("--jobs", default=",".join((*SPEED, *DISTANCE)))
    parser.add_argument("--json")
    parser.add_argument("--serve")
    parser.add_argument("--arrays")
    parser.add_argument("--shape", type=int, nargs=3)
    parser.add_argument("--classes", type=int)
    options = parser.parse_args()
    if options.serve:
        return parties.serve(lambda: ready(options))
    run(options)


def run(options):
    from tempfile import TemporaryDirectory

    from keras_emr.data import load

    data = load(options.data)
    x, y = data.x_test[: options.n], data.y_test[: options.n]
    names = [*options.backends.split(","), *filter(None, options.peers.split(","))]
    shape = [str(side) for side in (data.image_shape[2], *data.image_shape[:2])]
    with TemporaryDirectory() as folder:
        arrays = str(Path(folder) / "given.npz")
        np.savez(arrays, x=x, y=y)
        arguments = [*sys.argv[1:], "--arrays", arrays, "--shape", *shape]
        arguments += ["--classes", str(data.classes)]
        processes = {
            name: parties.start([__file__, *arguments, "--serve", name], name) for name in names
        }
        logits = {name: np.array(parties.ask(process)) for name, process in processes.items()}
        for name in names[1:]:
            apart = np.abs(logits[name] - logits[names[0]]).max()
            assert apart < 1e-3 * np.abs(logits[names[0]]).max(), f"{name}: logits {apart} apart"
        found = {job: {name: [] for name in names} for job in options.jobs.split(",")}
        for job, answers in found.items():
            rounds = 1 if job in (*SUITES, *DISTANCE) else options.rounds + 1
            for turn in range(rounds):
                for name, process in processes.items():
                    if turn == 0 or answers[name][0] is not None:
                        answers[name].append(parties.ask(process, job))
                        print(f"{job} {name}: {answers[name][-1]}", file=sys.stderr, flush=True)
            report(job, answers, len(x), min(options.n_distance, len(x)))
        parties.stop(processes.values())
    if options.json:
        Path(options.json).write_text(json.dumps(found, indent=1))


def report(job, answers, n, n_distance):
    for name, rows in answers.items():
        if rows[0] is None:
            continue
        seconds = np.median([r["seconds"] for r in rows[1:] or rows])
        count = n_distance if job in DISTANCE else n
        result = (
            f"median distance {rows[0]['median']:.4f}, found {rows[0]['found']}"
            if job in DISTANCE
            else f"robust {100 * rows[0]['robust']:.1f} %"
        )
        print(
            f"{job:14s} {name:13s} {result:40s} {count / seconds:9.1f} images/s "
            f"(first {rows[0]['seconds']:.1f} s)",
            flush=True,
        )


if __name__ == "__main__":
    main()
