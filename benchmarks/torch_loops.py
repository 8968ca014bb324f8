"""Adversarial training as a plain PyTorch loop, after the formulas of the papers.

AT (Madry et al., ICLR 2018), TRADES (Zhang et al., ICML 2019), MART (Wang et al., ICLR 2020), EMR
(Liu & Chan, BMVC 2022). The network is attacked in evaluation mode, and gradients are taken with
respect to the images alone. The clean pass of TRADES is made once for the attack and once for the
loss; the authors' code repeats it in every step.
"""

import contextlib

import torch
from torch.nn import functional as F


def trades_loss(clean, adversarial, y, beta):
    """``CE(z(x), y) + beta KL(p(x) || p(x_adv))``, batch mean."""
    divergence = _divergence(F.log_softmax(clean, 1), adversarial)
    return F.cross_entropy(clean, y) + beta * divergence / len(y)


def _divergence(log_p, logits):
    """``sum_i KL(p_i || softmax(logits_i))``."""
    return F.kl_div(F.log_softmax(logits, 1), log_p, reduction="sum", log_target=True)


def mart_loss(clean, adversarial, y, beta):
    """``BCE(x_adv) + beta (1 - p_y(x)) KL(p(x) || p(x_adv))``, batch mean; the code's constants."""
    log_p, q = F.log_softmax(clean, 1), F.softmax(adversarial, 1)
    own = F.one_hot(y, clean.shape[1]).bool()
    rival = q.gather(1, q.detach().masked_fill(own, -1).argmax(1, keepdim=True))[:, 0]
    boosted = F.cross_entropy(adversarial, y) - torch.log(1.0001 - rival + 1e-12).mean()
    p = log_p.exp()
    divergence = (p * (log_p - torch.log(q + 1e-12))).sum(1)
    weight = 1.0000001 - p.gather(1, y[:, None])[:, 0]
    return boosted + beta * (weight * divergence).mean()


def effective_weight_norm(network, x):
    """Mean ``|| d (c . z) / dx ||^2``, ``c`` the constant softmax; differentiable once more."""
    x = x.detach().requires_grad_()
    logits = network(x)
    shares = F.softmax(logits.detach(), 1)
    (gradient,) = torch.autograd.grad((shares * logits).sum(), x, create_graph=True)
    return gradient.square().flatten(1).sum(1).mean()


def perturb(network, x, y, options, divergence=False, small=False):
    """PGD in the Linf ball on cross-entropy, or on the divergence from the clean prediction.

    ``small``: start at ``x + 0.001 n`` as TRADES and MART do, else uniformly in the ball.
    """
    epsilon = options["epsilon"]
    if divergence:
        with torch.no_grad():
            log_p = F.log_softmax(network(x).float(), 1)
    if small:
        found = x + 0.001 * torch.randn_like(x)
    else:
        found = (x + torch.empty_like(x).uniform_(-epsilon, epsilon)).clamp(0, 1)
    for _ in range(options["steps"]):
        found.requires_grad_()
        logits = network(found).float()
        if divergence:
            value = _divergence(log_p, logits)
        else:
            value = F.cross_entropy(logits, y, reduction="sum")
        (gradient,) = torch.autograd.grad(value, found)
        found = found.detach() + options["step_size"] * gradient.sign()
        found = torch.minimum(torch.maximum(found, x - epsilon), x + epsilon).clamp(0, 1)
    return found


class Loop:
    """One job's training step.

    Args:
        network: module, NCHW images to logits.
        job: ``standard``, ``at``, ``trades``, ``mart`` or ``at-emr``.
        options: epsilon, step_size, steps, momentum, trades_beta, mart_beta, emr; of ``best`` alone
            also attack_precision.
        attack: ``(x, y) -> x_adv`` in place of :func:`perturb`.
        best: whatever PyTorch has to be fast: the images' channels last; on a GPU bfloat16, cuDNN's
            search, a fused optimizer; ``compiled``: torch.compile. EMR's pass stays in float32 and
            not compiled: compiled graphs have no second derivative.
    """

    def __init__(self, network, job, options, attack=None, best=False, compiled=False):
        self.network, self.job, self.options, self.attack = network, job, options, attack
        self.device = next(network.parameters()).device
        self.best, on_gpu = best, self.device.type == "cuda"
        if best:
            network.to(memory_format=torch.channels_last)
            torch.backends.cudnn.benchmark = True
            torch.set_float32_matmul_precision("high")
        self.run = torch.compile(network, dynamic=False) if compiled else network
        self.half = best and on_gpu
        self.low_attack = best and options["attack_precision"] == "bfloat16"
        self.optimizer = torch.optim.SGD(
            network.parameters(), 0.0, options["momentum"], fused=self.half or None
        )

    def restart(self, learning_rate):
        restart(self.optimizer, learning_rate)

    def _casting(self, low):
        kind = self.device.type
        return torch.autocast(kind, torch.bfloat16) if low else contextlib.nullcontext()

    def _adversarial(self, x, y):
        self.network.eval()
        if self.attack:
            return self.attack(x, y)
        if self.best:  # a compiled backward pass would compute the weights' gradients as well
            self.network.requires_grad_(False)
        with self._casting(self.half or self.low_attack):
            found = perturb(
                self.run, x, y, self.options, self.job == "trades", self.job in ("trades", "mart")
            )
        if self.best:
            self.network.requires_grad_(True)
        return found

    def _loss(self, x, x_adv, y):
        with self._casting(self.half):
            clean = self.run(x) if self.job in ("standard", "trades", "mart") else None
            adversarial = self.run(x_adv) if x_adv is not None else None
        clean, adversarial = (z if z is None else z.float() for z in (clean, adversarial))
        if self.job == "trades":
            return trades_loss(clean, adversarial, y, self.options["trades_beta"])
        if self.job == "mart":
            return mart_loss(clean, adversarial, y, self.options["mart_beta"])
        return F.cross_entropy(clean if adversarial is None else adversarial, y)

    def step(self, x, y):
        """Train on a batch of host arrays; its loss and, with EMR, the mean penalty."""
        x, y = torch.from_numpy(x).to(self.device), torch.from_numpy(y).to(self.device)
        x_adv = None if self.job == "standard" else self._adversarial(x, y)
        self.network.train()
        self.optimizer.zero_grad()
        loss, penalty = self._loss(x, x_adv, y), None
        if self.job == "at-emr":
            self.network.eval()
            penalty = effective_weight_norm(self.network, x_adv)
            loss = loss + self.options["emr"] * penalty
        loss.backward()
        self.optimizer.step()
        return {"loss": loss.item(), "penalty": penalty if penalty is None else penalty.item()}


def restart(optimizer, learning_rate):
    """Forget the momentum, and go on with another learning rate."""
    optimizer.state.clear()
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
