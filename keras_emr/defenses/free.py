"""Free adversarial training (Shafahi et al., NeurIPS 2019)."""

from keras import ops

from keras_emr.defenses.adversarial_training import AdversarialTraining
from keras_emr.part import register, whole


@register
class FreeAdversarialTraining(AdversarialTraining):
    """``CE(z(x + d), y)``, where one backward pass serves the weights and ``d`` alike.

    Every batch is trained on ``replays`` times in a row. Each time the weights descend and the
    perturbation ascends: ``d <- clip(d + epsilon sign(g), -epsilon, epsilon)``, ``g`` the gradient
    at ``clip01(x + d)``. ``d`` has a row for each place in a batch and lives on from batch to
    batch, so that a batch begins with what the last one left. An attack of the step's own costs
    nothing; of the classifier's attack only epsilon is used, in training.

    Epochs are passes over the data in which each batch comes ``replays`` times: the authors divide
    the number of epochs by ``replays``. :class:`keras_emr.data.TrainBatches` repeats batches.

    Args:
        batch_size: examples in a batch, >= 1; smaller batches use the first rows of ``d``.
        replays: >= 1; the authors use 8 on CIFAR-10 and 4 on ImageNet.
        label_smoothing, logit_margin: as in :class:`AdversarialTraining`.
    """

    name = "free-at"

    def __init__(self, batch_size, replays=8, label_smoothing=0.0, logit_margin=0.0):
        super().__init__(0.0, label_smoothing, logit_margin)
        self.batch_size = whole("batch_size", batch_size, 1)
        self.replays = whole("replays", replays, 1)

    @staticmethod
    def ascend(perturbation, gradient, epsilon):
        """The next ``d``."""
        moved = perturbation + epsilon * ops.sign(gradient)
        return ops.minimum(ops.maximum(moved, -epsilon), epsilon)
