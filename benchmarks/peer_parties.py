"""The peers of ``peers.py``: a plain PyTorch loop, torchattacks, ART. Imports torch."""

import numpy as np
import torch
from torch_loops import Loop, restart
from torch_networks import make_network, take_weights


class Unsupported(Exception):
    """The library has no such job."""


class PyTorch:
    """The loop in ``torch_loops.py``."""

    best = False

    def __init__(self, name, options, folder, given):
        torch.manual_seed(0)
        self.options, self.given = options, given
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        images = given["x"].transpose(0, 1, 4, 2, 3)
        self.images = images if self.best else np.ascontiguousarray(images)

    def network(self):
        o = self.options
        network = make_network(o["model"], o["shape"], o["classes"])
        return take_weights(network, self.given).to(self.device)

    def logits(self):
        few = torch.from_numpy(self.images[0][: len(self.given["logits"])]).to(self.device)
        with torch.no_grad():
            return self.network().eval()(few).cpu().numpy()

    def trainer(self, job, attack=None):
        if job == "at-lstm":
            raise Unsupported("no learned maximizer")
        compiled = self.best and (self.device == "cuda" or self.options["compile"])
        network = self.network()
        attack = attack and attack(network)
        return Loop(network, job, self.options, attack, self.best, compiled)

    def on_gpu(self):
        return self.device == "cuda"

    def wait(self):
        """Until the device has done what it was told."""
        if self.on_gpu():
            torch.cuda.synchronize()


class PyTorchBest(PyTorch):
    """The same with what PyTorch has to be fast."""

    best = True


class Torchattacks(PyTorch):
    """Its attacks in that loop."""

    def trainer(self, job, attack=None):
        import torchattacks

        o = self.options
        ball = {"eps": o["epsilon"], "alpha": o["step_size"], "steps": o["steps"]}
        kind = torchattacks.TPGD if job == "trades" else torchattacks.PGD
        return super().trainer(job, lambda network: kind(network, **ball))


class Art(PyTorch):
    """Its trainers."""

    def __init__(self, *arguments):
        import art.defences.trainer  # noqa: F401  (fails here where it is not whole)

        super().__init__(*arguments)

    def trainer(self, job, attack=None):
        if job not in ("standard", "at", "trades"):
            raise Unsupported("no such trainer")
        return ArtTrainer(self.network(), job, self.options)


class ArtTrainer:
    """One of ART's trainers, told to fit a batch."""

    def __init__(self, network, job, options):
        from art.attacks.evasion import ProjectedGradientDescent
        from art.defences import trainer
        from art.estimators.classification import PyTorchClassifier

        self.optimizer = torch.optim.SGD(network.parameters(), 0.0, options["momentum"])
        self.entropy = RecordedEntropy()
        height, width, channels = options["shape"]
        classifier = PyTorchClassifier(
            network,
            self.entropy,
            (channels, height, width),
            options["classes"],
            optimizer=self.optimizer,
            clip_values=(0.0, 1.0),
            device_type="gpu" if torch.cuda.is_available() else "cpu",
        )
        ball = {"eps": options["epsilon"], "eps_step": options["step_size"]}
        ball |= {"max_iter": options["steps"], "num_random_init": 1}
        self.batch_size, self.sums = options["batch_size"], None
        if job == "standard":
            self.trainer = classifier
        elif job == "at":
            self.trainer = trainer.AdversarialTrainerMadryPGD(classifier, **ball)
            # Its attack goes through a batch in portions of 32 unless told otherwise.
            self.trainer.attack.set_params(batch_size=self.batch_size)
        else:
            attack = ProjectedGradientDescent(
                classifier, **ball, batch_size=self.batch_size, verbose=False
            )
            beta = options["trades_beta"]
            self.trainer = trainer.AdversarialTrainerTRADESPyTorch(classifier, attack, beta)
            process = self.trainer._batch_process
            self.trainer._batch_process = lambda x, y: self._keep(process(x, y))

    def _keep(self, sums):
        """The sum of losses, which ``fit`` tells only the log, and of what else it returns."""
        self.sums = sums
        return sums

    def restart(self, learning_rate):
        restart(self.optimizer, learning_rate)

    def step(self, x, y):
        self.trainer.fit(x, y, batch_size=self.batch_size, nb_epochs=1)
        loss = self.sums[0] / self.sums[2] if self.sums else self.entropy.last.item()
        return {"loss": loss, "penalty": None}


class RecordedEntropy(torch.nn.CrossEntropyLoss):
    """Cross-entropy that remembers its last value: ART's trainers tell none."""

    last = None

    def forward(self, *arguments):
        value = super().forward(*arguments)
        self.last = value.detach()
        return value
