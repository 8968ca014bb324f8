"""MAIL: margin-aware instance reweighting (Wang et al., NeurIPS 2021)."""

from keras import ops

from keras_emr import losses
from keras_emr.defenses.base import Defense, smoothing
from keras_emr.defenses.mart import MART
from keras_emr.defenses.trades import TRADES
from keras_emr.errors import UserError
from keras_emr.part import non_negative, one_of, register, whole

BASES = ("at", "trades", "mart")
MARGINS = ("adversarial", "natural", "difference")
NORMALIZATIONS = ("constant", "batch")
# slope, bias of the authors' README; MAIL-MART's are from the paper as others recall it.
_SETTINGS = {"at": (10.0, -0.5), "trades": (2.0, 0.0), "mart": (2.0, 0.0)}


@register
class MAIL(Defense):
    """Reweights the adversarial term of a base method by each example's probabilistic margin.

    ``w_i = sigmoid(-slope (PM_i - bias))``, detached: a small margin gets a large weight.

    * ``at``: ``mean_i omega_i CE(z(x_adv_i), y_i)``;
    * ``trades``: ``CE(z(x), y) + beta omega_i KL(p(x) || p(x_adv))``;
    * ``mart``: ``omega_i BCE_i + beta WKL_i``.

    Args:
        base: ``at``, ``trades`` or ``mart``.
        slope, bias: of the weight; ``None``: 10, -0.5 (at), 2, 0 (trades, mart).
        normalization: ``constant``: ``omega = constant * w``, the released code; ``batch``:
            ``omega = N w / sum(w)`` over the batch, the paper.
        constant: factor of the ``constant`` normalisation; 3 in the released code.
        margin: which probabilistic margin ``p_y - max_{k != y} p_k``: ``adversarial`` (the
            released code), ``natural``, or ``difference`` (clean ``p_y`` against adversarial
            rivals).
        burn_in: epochs of the unweighted base method before reweighting starts (the released
            schedule: 76 of 120).
        beta: of the base method; ``None``: 5, the released setting.
        label_smoothing: as in the base method; not with ``mart``, whose boosted cross-entropy has
            no such form.
    """

    name = "mail"

    def __init__(
        self,
        base="at",
        slope=None,
        bias=None,
        normalization="constant",
        constant=3.0,
        margin="adversarial",
        burn_in=76,
        beta=None,
        label_smoothing=0.0,
    ):
        self.base = one_of("MAIL base", base, BASES)
        self.normalization = one_of("MAIL normalization", normalization, NORMALIZATIONS)
        self.margin = one_of("MAIL margin", margin, MARGINS)
        self.burn_in = whole("burn_in", burn_in, 0)
        self.slope = _SETTINGS[base][0] if slope is None else float(slope)
        self.bias = _SETTINGS[base][1] if bias is None else float(bias)
        self.constant = non_negative("constant", constant)
        self.beta = non_negative("beta", 5.0 if beta is None else beta)
        self.label_smoothing = smoothing(label_smoothing)
        if self.label_smoothing and base == "mart":
            raise UserError(
                "MART's boosted cross-entropy has no smoothed form. Received: "
                f"label_smoothing={label_smoothing!r} with base 'mart'. Use at or trades."
            )
        self.name = f"mail-{base}"
        self.needs_clean = base != "at" or margin != "adversarial"
        family = TRADES if base == "trades" else MART
        self.attack_defaults = family.attack_defaults

    def weights(self, y, clean, adversarial, epoch):
        """(N,) instance weights ``omega``; ones during burn-in. No gradient."""
        if self.margin == "adversarial":
            margin = losses.probabilistic_margin(y, adversarial)
        elif self.margin == "natural":
            margin = losses.probabilistic_margin(y, clean)
        else:
            margin = losses.probabilistic_margin(y, clean, rival_logits=adversarial)
        weight = ops.sigmoid(-self.slope * (margin - self.bias))
        if self.normalization == "batch":
            omega = weight / ops.mean(weight)
        else:
            omega = self.constant * weight
        burning_in = ops.cast(epoch, "int32") < self.burn_in
        return ops.stop_gradient(ops.where(burning_in, ops.ones_like(omega), omega))

    def loss(self, y, clean, adversarial, epoch):
        omega = self.weights(y, clean, adversarial, epoch)
        if self.base == "trades":
            divergence = losses.kl_divergence(clean, adversarial)
            smooth = losses.cross_entropy(y, clean, self.label_smoothing)
            return smooth + self.beta * omega * divergence
        if self.base == "mart":
            boosted = losses.boosted_cross_entropy(y, adversarial)
            return omega * boosted + self.beta * losses.weighted_kl(y, clean, adversarial)
        return omega * losses.cross_entropy(y, adversarial, self.label_smoothing)
