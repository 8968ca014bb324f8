"""RobustClassifier: a ``keras.Model`` that trains another one adversarially."""

from __future__ import annotations

import itertools

import keras
from keras import ops

from keras_emr import backend, distribution, losses
from keras_emr.attacks import ATTACKS
from keras_emr.attacks.base import Attack, Objective
from keras_emr.attacks.learned import LearnedAttack
from keras_emr.attacks.pgd import referee
from keras_emr.backend import replicas
from keras_emr.defenses import DEFENSES, get_defense
from keras_emr.errors import UserError
from keras_emr.models.logits import own_input_shape, require_logits
from keras_emr.network import Network
from keras_emr.part import one_of, register
from keras_emr.regularizers import effective_margin as _effective_margin  # noqa: F401
from keras_emr.sampling import VALIDATION_SEED, StreamSampler
from keras_emr.training.averaging import AveragedWeights
from keras_emr.training.callbacks import EpochTracker
from keras_emr.training.companions import Companions
from keras_emr.training.maximizer_training import MAXIMIZER_UPDATES, MaximizerTraining
from keras_emr.training.saving import Saving
from keras_emr.training.weight_perturbation import WeightPerturbation

# Loading a saved classifier finds parts by their registered names: all must have been imported.
ATTACKS.load_all()
DEFENSES.load_all()

ATTACK_MODES = ("inference", "training")
ATTACK_PRECISIONS = ("float32", "bfloat16")


@keras.saving.register_keras_serializable("keras_emr")
class PerExampleMean(keras.losses.Loss):
    """Keras's own weighting and reduction of per-example losses, over the global batch."""

    def __call__(self, *args, **kwargs):
        return replicas.whole(super().__call__(*args, **kwargs))

    def call(self, y_true, y_pred):
        return y_pred


@register
class RobustClassifier(
    AveragedWeights,
    WeightPerturbation,
    Companions,
    MaximizerTraining,
    Saving,
    backend.StepMixin,
    keras.Model,
):
    """Trains ``model`` with a defense, an attack and regularizers; ``fit`` is Keras's own.

    Each batch: the attack searches ``x_adv`` (inner maximisation), the defense turns the logits
    at ``x`` and ``x_adv`` into a loss, the regularizers are added (outer minimisation). The inner
    model stays a plain Keras model: save ``classifier.model`` for use without ``keras_emr``.

    Logs: ``loss``, ``accuracy`` (clean), ``robust_accuracy`` (at ``x_adv``), one entry per
    regularizer (``emr``: the mean unweighted penalty), and their ``val_`` twins. In training the
    accuracies are those of the passes that the loss makes (training mode); a defense that never
    looks at clean images gets an inference pass for ``accuracy``. ``robust_accuracy`` is absent
    where there is no attack. Where a learned maximizer is trained: ``inner_loss`` (the objective
    of its attack at the last step) and ``skipped_updates`` (updates of an epoch left out because
    a gradient was not finite); in validation the cross-entropy under its attack and under
    ``eval_attack`` on the same images, ``learned_loss`` and ``referee_loss``: a maximizer that
    the classifier has learned to fool falls behind.

    With ``attack=LearnedAttack(...)`` the maximizer's weights phi are trained with the classifier
    (Xiong & Hsieh, ECCV 2020: RNN-Adv with defense ``at``, RNN-TRADES with ``trades``), by an
    optimizer of their own; for ``compile``'s optimizer they are not trainable.

    Labels are integers (N,); of mixed images (mixup, cutmix) the classes' shares (N, K), where
    the defense takes them: accuracies and regularizers then go by the dominant class. Data for a
    defense that remembers its examples give ``{"label": ..., "number": ...}`` instead.

    Args:
        model: Keras classifier, (N, H, W, C) images in [0, 1] to (N, K) **logits**.
        defense: a defense or its name, e.g. ``"trades"``.
        attack: the training attack, e.g. ``PGD(8/255)``; options left at ``None`` become what the
            defense prescribes. ``None`` only for defenses without an attack.
        regularizers: list of regularizers, e.g. ``[EffectiveMarginRegularizer(0.01)]``.
        eval_attack: attack of ``evaluate`` and validation, on cross-entropy from a uniform start
            unless it says otherwise. ``None``: PGD with the training attack's norm, epsilon and
            steps, and step size and restarts if that is PGD.
        attack_mode: ``inference`` (BatchNorm statistics frozen, no dropout) or ``training`` mode
            of the network while it is attacked in training. Evaluation always uses inference.
        attack_precision: of the network's layers while it is attacked in training: ``float32``, or
            ``bfloat16`` for speed on hardware that has it. The clean accuracy that a defense
            without a clean term logs is of that network too. Evaluation always uses float32.
        maximizer_update: ``joint``: one attack serves both updates of a batch; ``alternating``:
            after the classifier's update the batch is attacked anew for phi's (Jiang et al.,
            AISTATS 2021; a second attack per batch); ``frozen``: phi stays as it is.
        averaging: ``None``, or an ``EMA`` or ``SWA`` of ``keras_emr.training.averaging``:
            validation and ``evaluate`` then use the averaged weights; save within
            :meth:`averaged`.
        weight_perturbation: ``None``, or an ``AWP`` of ``keras_emr.training.weight_perturbation``.
        teacher: the second network of defense ``lbgat``, images to (N, K) logits; ``None``: one
            like ``model``. It is trained by the same optimizer and saved with this classifier, not
            with ``model``.
        epsilon_schedule: ``None``, or a schedule of ``keras_emr.regularizers.schedules`` for the
            training attack's epsilon and step size, e.g. ``WarmUp(5)``.
        seed: of the training attack's noise; not shared with the model's own seeds.

    Raises:
        UserError: the model ends in softmax, a defense lacks its attack, an unknown name.
    """

    def __init__(
        self,
        model,
        defense="trades",
        attack=None,
        regularizers=(),
        eval_attack=None,
        attack_mode="inference",
        attack_precision="float32",
        maximizer_update="joint",
        averaging=None,
        weight_perturbation=None,
        epsilon_schedule=None,
        teacher=None,
        seed=0,
        **kwargs,
    ):
        if own_input_shape(model) is None:
            require_logits(model)  # what can be seen before it is built
        kwargs.setdefault("dtype", model.dtype_policy)
        super().__init__(**kwargs)
        defense = get_defense(defense) if isinstance(defense, str) else defense
        for field, value in (("attack", attack), ("eval_attack", eval_attack)):
            usable = isinstance(value, Attack) and not value.evaluation_only
            if value is not None and not usable:
                raise UserError(
                    f"{field} must be an attack that runs inside a training step, such as "
                    f"keras_emr.PGD(epsilon=8/255). Received: {value!r}."
                )
        if isinstance(eval_attack, LearnedAttack):
            raise UserError(
                "validation needs an attack that is not trained to please the classifier. "
                f"Received: eval_attack={eval_attack.name!r}. Use keras_emr.PGD(...); afterwards "
                "keras_emr.evaluate_attack takes learned attacks too."
            )
        if defense.needs_adversarial and attack is None:
            raise UserError(
                f"defense {defense.name!r} needs an attack. Received: attack=None. Pass for "
                "example attack=keras_emr.PGD(epsilon=8/255)."
            )
        self.model = model
        self.defense = defense
        self.attack = attack and attack.with_defaults(**defense.attack_defaults)
        if defense.needs_adversarial and self.attack.stuck:
            raise UserError(
                f"attack {attack.name!r} starts at the clean image, where the gradient of the KL "
                f"divergence is zero. Received: defense={defense.name!r}, start='none'. Use "
                "attack pgd, or objective='cross_entropy'."
            )
        self.eval_attack = eval_attack or (attack and referee(attack))
        self.regularizers = [r for r in regularizers if r.weight > 0]
        for regularizer in self.regularizers:
            regularizer.check(model, defense.needs_adversarial)
        self.attack_mode = one_of("attack_mode", attack_mode, ATTACK_MODES)
        self.attack_precision = one_of("attack_precision", attack_precision, ATTACK_PRECISIONS)
        self.maximizer_update = one_of("maximizer_update", maximizer_update, MAXIMIZER_UPDATES)
        self.averaging, self._swapped = averaging, False
        self.weight_perturbation = weight_perturbation
        self.epsilon_schedule = epsilon_schedule
        if weight_perturbation is not None and not defense.needs_adversarial:
            raise UserError(
                "weights are perturbed for a defense with an attack. Received: "
                f"defense={defense.name!r} with weight_perturbation. Use at or trades."
            )
        self._make_companions(teacher, weight_perturbation)
        self.seed = seed
        self._given = {"attack": attack, "eval_attack": eval_attack, "regularizers": regularizers}

        self.attack_seed = keras.random.SeedGenerator(seed, name="attack_seed")
        other_seed = (seed + 2**30) % 2**31  # torch takes no larger one
        self.regularizer_seed = keras.random.SeedGenerator(other_seed, name="regularizer_seed")
        self.epoch = self.add_weight(
            shape=(),
            dtype="int32",
            initializer=keras.initializers.Constant(-1),
            trainable=False,
            name="epoch",
        )
        self.mean_over_batch = PerExampleMean(name="mean_over_batch")
        mean = keras.metrics.Mean
        self.loss_metric = mean(name="loss")
        self.accuracy_metric = mean(name="accuracy")
        self.robust_accuracy_metric = mean(name="robust_accuracy")
        self.regularizer_metrics = [mean(name=r.name) for r in self.regularizers]
        self.maximizer = attack.maximizer if isinstance(attack, LearnedAttack) else None
        self.maximizer_optimizer = None
        self._maximizer_alone = False
        if self.maximizer is not None:
            self._make_maximizer_metrics()
        shape = own_input_shape(model)
        if shape is not None:
            self.build((None, *shape))
            self.built = True

    def build(self, input_shape):
        if not (self.model.built and self.model.variables):
            # A call, not `build`: a subclassed model may have no other way to make its weights.
            self.model(keras.KerasTensor((None, *input_shape[1:])))
        require_logits(self.model, input_shape[1:])
        self._build_averages()
        self._build_companions(input_shape)
        if self.maximizer is not None:
            self._build_maximizer(input_shape)

    def _build_for(self, data):
        """Build for what ``fit`` was given: in a compiled step it would be too late."""
        if self.built or data is None:
            return
        if isinstance(data, keras.utils.PyDataset):
            data = data[0][0]
        elif hasattr(data, "element_spec"):
            data = data.element_spec[0]
        if getattr(data, "shape", None) is not None:
            self.build((None, *data.shape[1:]))
            self.built = True

    def call(self, inputs, training=None):
        return self.model(inputs, training=training)

    @property
    def metrics(self):
        """Keras's metrics, with the loss tracker of this class in place of the private one."""
        return [self.loss_metric, *(m for m in super().metrics if m.name != "loss")]

    @property
    def non_trainable_variables(self):
        """Keras's, and the slots of phi's optimizer: a step changes them all."""
        slots = self.maximizer_optimizer.variables if self.maximizer_optimizer else []
        return [*super().non_trainable_variables, *slots]

    def compile(self, optimizer="adam", loss=None, maximizer_optimizer=None, **kwargs):
        """As ``keras.Model.compile``; the loss is the defense's and cannot be given.

        Args:
            maximizer_optimizer: for phi, which ascends; ``None``: Adam(1e-2, global_clipnorm=1).
        """
        if loss is not None:
            raise UserError(
                f"RobustClassifier takes its loss from the defense. Received: loss={loss!r}. "
                "Leave it out, or write a keras_emr defense."
            )
        super().compile(optimizer=optimizer, **kwargs)
        replicas.check_optimizer(self.optimizer)
        if self.maximizer is not None:
            self.maximizer_optimizer = keras.optimizers.get(
                maximizer_optimizer or keras.optimizers.Adam(1e-2, global_clipnorm=1.0)
            )
            self._build_maximizer_optimizer()

    def fit(
        self, x=None, y=None, batch_size=None, epochs=1, verbose="auto", callbacks=None, **kwargs
    ):
        """As ``keras.Model.fit``. Data with a ``set_epoch`` method is told the epoch's number."""
        self._build_for(x)
        kwargs = distribution.fit_options(x, batch_size, kwargs)
        if getattr(x, "mixes", False) or (len(getattr(y, "shape", ())) == 2 and y.shape[1] > 1):
            self.require_shares()
        tracker = EpochTracker(x if hasattr(x, "set_epoch") else None, self.seed)
        if isinstance(callbacks, keras.callbacks.CallbackList):
            callbacks.append(tracker)
            tracker.set_model(self)
        elif isinstance(callbacks, keras.callbacks.Callback):
            callbacks = [tracker, callbacks]
        else:
            callbacks = [tracker, *(callbacks or [])]
        with backend.preserve_random_state():
            return super().fit(x, y, batch_size, epochs, verbose, callbacks, **kwargs)

    def _objective(self, network, attack, x, y, training):
        if training and self.attack_mode == "training":
            logits_fn = network.frozen(True, compute=self.attack_precision)
        else:
            logits_fn = self._seen(network, training)
        name = attack.objective or "cross_entropy"
        return Objective(logits_fn, name, x, y, unroll=self.jit_compile)

    def _seen(self, network, training):
        return network.constant(self.attack_precision if training else "float32")

    @property
    def training_attack(self):
        """The attack of a training step, with the epsilon of the epoch under way."""
        if self.epsilon_schedule is None or self.attack is None:
            return self.attack
        return self.attack.scaled(self.epsilon_schedule(ops.maximum(self.epoch.value, 0)))

    def find_adversarial(self, network, x, y, training):
        """Inner maximisation: adversarial images for a batch, or ``None`` without an attack."""
        attack = self.training_attack if training else self.eval_attack
        if attack is None or (training and not self.defense.needs_adversarial):
            return None
        if training and self._learns == "joint":
            return self.train_maximizer(network, x, y)
        objective = self._objective(network, attack, x, y, training)
        sampler = StreamSampler(self.attack_seed if training else VALIDATION_SEED)
        return attack(objective, x, sampler, self._classes(network, attack))

    def _sloped(self):
        """The images whose input gradient a regularizer takes: ``clean``, ``adversarial``."""
        asked = [getattr(r, "slopes_at", None) for r in self.regularizers]
        return {point for of in asked if of for point in of(self.defense.needs_adversarial)}

    def robust_step(self, x, y, sample_weight, training, x_adv=None):
        """The computation that every backend's ``train_step`` and ``test_step`` share.

        Args:
            x_adv: adversarial images that were found already.

        Returns:
            ``(loss, logs)``: scalar outer loss, differentiable in training, and metric results.
        """
        number = y["number"] if isinstance(y, dict) else None
        x, shares = self._as_batch(x, y)
        y = losses.dominant(shares)
        if losses.is_soft(shares):
            self.require_shares()
        epoch = ops.maximum(self.epoch.value, 0)  # `train_on_batch` never sets it
        network = Network(self.model)
        needed = {}
        # Images that were found already may depend on what is learned from them.
        sloped = self._sloped() if training and x_adv is None else ()
        if x_adv is None and training and self.defense.needs_margins:
            x_adv, needed["counted"] = self.find_boundary(network, x, y, number)
        elif x_adv is None:
            x_adv = self.find_adversarial(network, x, shares, training)

        # A step without a clean pass shows the accuracy before its statistics move.
        shown = None if self.defense.needs_clean else self._seen(network, training)(x)
        # Clean and adversarial images in passes of their own: in one batch they would share
        # BatchNorm statistics, which is another algorithm.
        clean = adversarial = None
        layer_losses = []
        if self.defense.needs_clean:
            clean = network(x, training, sloped="clean" in sloped)
            layer_losses.append(self.model.losses)  # now: the next call of the model clears them
        if self.defense.needs_adversarial:
            adversarial = network(x_adv, training, sloped="adversarial" in sloped)
            layer_losses.append(self.model.losses)
        elif x_adv is not None:
            adversarial = network.constant()(x_adv)
        shown = losses.widen(ops.stop_gradient(clean) if shown is None else shown)

        if self.teacher is not None:
            needed["teacher"] = self.teach(x, y, training)
        # From here on `shares`, `labels`, logits and weights are those of the global batch.
        shares, sample_weight = replicas.gather(shares), replicas.gather(sample_weight)
        labels, shown = losses.dominant(shares), replicas.gather(shown)
        clean, adversarial = replicas.gather(clean), replicas.gather(adversarial)
        per_example = self.defense.loss(shares, clean, adversarial, epoch, **needed)
        known = (labels >= 0) & (labels < shown.shape[-1])
        # Nobody's label would be learned without a word: NaN stops the run.
        per_example = ops.where(known, per_example, float("nan"))
        loss = self.mean_over_batch(labels, per_example, sample_weight)
        sampler = StreamSampler(self.regularizer_seed if training else VALIDATION_SEED)
        for regularizer, metric in zip(self.regularizers, self.regularizer_metrics, strict=True):
            attacked = x_adv if self.defense.needs_adversarial else None
            penalty = replicas.gather(regularizer(network, x, attacked, y, sampler))
            scale = regularizer.scale(epoch, ops.shape(labels)[0])
            loss = loss + scale * self.mean_over_batch(labels, penalty, sample_weight)
            metric.update_state(penalty, sample_weight)
        # The mean over the passes: penalties of weights count once, those of activities are shared.
        for extra in itertools.chain(*layer_losses):
            loss = loss + replicas.mean(ops.cast(extra, loss.dtype)) / len(layer_losses)
        if self.teacher is not None:
            for extra in self.teacher.losses:
                loss = loss + ops.cast(extra, loss.dtype)

        self.loss_metric.update_state(loss, sample_weight=ops.shape(labels)[0])
        self.accuracy_metric.update_state(losses.correct(labels, shown), sample_weight)
        if adversarial is not None:
            right = losses.correct(labels, adversarial)
            self.robust_accuracy_metric.update_state(right, sample_weight)
        if self.maximizer is not None and not training:
            self._judge_maximizer(network, x, y, adversarial, sample_weight)
        logs = self.compute_metrics(x, labels, shown, sample_weight)
        # A zero would be a lie where nothing was attacked or learned.
        absent = () if adversarial is not None else ("robust_accuracy",)
        absent += ("margin",) if not training else ()
        absent += self._absent_maximizer_logs(training)
        return loss, {name: value for name, value in logs.items() if name not in absent}

    @staticmethod
    def _as_batch(x, y):
        """Images, and labels (N,) or shares of the classes (N, K)."""
        y = y["label"] if isinstance(y, dict) else y
        x = ops.cast(x, keras.config.floatx())
        if len(y.shape) == 2 and y.shape[1] != 1:
            return x, ops.cast(y, x.dtype)
        return x, ops.cast(ops.reshape(y, (-1,)), "int32")

    @staticmethod
    def _classes(network, attack):
        # A subclassed model that was never called does not know; only this start asks.
        return network.classes if attack.start == "odi" else None
