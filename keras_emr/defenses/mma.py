"""MMA: max-margin adversarial training (Ding et al., ICLR 2020)."""

from keras import ops

from keras_emr import losses
from keras_emr.defenses.base import Defense
from keras_emr.errors import UserError
from keras_emr.part import non_negative, register, whole


@register
class MMA(Defense):
    """``(1 - a) c_i CE(z(x_adv), y) + a CE(z(x), y)``, ``x_adv`` near the decision boundary.

    Where an example is classified correctly, ``x_adv`` is the shortest perturbation found along
    the attack's direction that changes that (:func:`keras_emr.attacks.boundary_search.search`),
    which moves the boundary away from ``x``: ``c_i`` is 1 while its length, the example's margin,
    is below ``d_max``, the attack's epsilon, and 0 from there on. Elsewhere ``x_adv = x`` and
    ``c_i`` is 1.

    The margin of every training example is remembered: the next attack on it begins there. For
    that the data must say which example is which (``TrainBatches(..., numbered=True)``); without,
    the attack begins at ``d_max``.

    As in the authors' code; but the search sees the network in the classifier's attack mode, as
    every attack here, and images stay in [0, 1].

    Args:
        clean_weight: ``a``, in [0, 1); the authors' is 1/3 (0: "OMMA").
        examples: training examples to remember, those of extra data included.
        smallest: least radius of an attack; ``None``: a tenth of ``d_max``. The authors' are 0.1
            (MNIST, Linf), 0.005 (CIFAR-10, Linf) and 0.5 (L2).
        trials: bisections, >= 1.
    """

    name = "mma"
    needs_clean = True
    needs_margins = True
    attack_defaults = {"objective": "soft_margin", "start": "uniform"}

    def __init__(self, clean_weight=1 / 3, examples=0, smallest=None, trials=10):
        self.clean_weight = non_negative("clean_weight", clean_weight)
        if self.clean_weight >= 1:
            raise UserError(
                f"clean_weight must be below 1. Received: {clean_weight!r}. Use defense standard."
            )
        self.examples = whole("examples", examples, 0)
        self.smallest = None if smallest is None else non_negative("smallest", smallest)
        self.trials = whole("trials", trials, 1)

    def loss(self, y, clean, adversarial, epoch, counted=None):
        attacked = losses.cross_entropy(y, adversarial)
        if counted is not None:
            attacked = ops.cast(counted, attacked.dtype) * attacked
        share = self.clean_weight
        return (1 - share) * attacked + share * losses.cross_entropy(y, clean)
