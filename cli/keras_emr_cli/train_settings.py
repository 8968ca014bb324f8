"""Every option of ``keras-emr train``."""

from __future__ import annotations

from keras_emr.models import ACTIVATIONS, MODEL_NAMES, NORMALIZATIONS, check_model_name
from keras_emr.training.intervals import check_interval
from keras_emr_cli.attack_settings import ATTACK
from keras_emr_cli.defense_settings import DEFENSE
from keras_emr_cli.reading_settings import reading
from keras_emr_cli.settings import BACKENDS, SEEDS, grouped
from keras_emr_cli.settings import Setting as S

# As keras_emr.data.augment has them, which imports numpy.
AUGMENTATIONS = ("none", "cifar")
HEADS = ("hypersphere",)


# With Adam's rate, SGD does not leave its start within a short run.
LEARNING_RATES = {"adam": 0.001, "sgd": 0.1}


def learning_rate(s):
    """The largest learning rate: as set, else the optimizer's own."""
    return LEARNING_RATES[s.optimizer] if s.learning_rate is None else s.learning_rate


def awp_warmup(s):
    """Epochs without AWP. A network that has learned nothing yet would be kept from beginning."""
    if s.awp_warmup is not None:
        return s.awp_warmup
    return 0 if s.defense == "at" else min(10, -(-s.epochs // 5))


def swa_start(s):
    """First epoch of SWA: as set, else after three quarters of the epochs."""
    return s.epochs * 3 // 4 + 1 if s.averaging_start is None else s.averaging_start


TRAIN = [
    *grouped(
        "data and model",
        S(
            "data",
            "text",
            "digits",
            "Data set: digits, FILE.npz, a folder of MNIST idx files or of class folders of"
            " pictures, restricted-imagenet:FOLDER, or tfds:NAME[:VERSION].",
        ),
        S(
            "model",
            "text",
            "small-cnn",
            "Network to train; also wide-resnet-D-K[-emr], FILE.keras, MODULE:FUNCTION.",
            MODEL_NAMES,
            check=check_model_name,
        ),
        S(
            "activation",
            "choice",
            None,
            "Activation of a named network.",
            ACTIVATIONS,
            auto="the network's own: relu; leaky_relu of slope 0.1 for wide-resnet-D-K-emr",
        ),
        S(
            "normalization",
            "choice",
            None,
            "Normalisation inside the model; data: by the training images' mean and deviation.",
            ("data", *NORMALIZATIONS),
            auto="none",
        ),
        S(
            "head",
            "choice",
            None,
            "Last layer; hypersphere: scaled cosines, and a margin in the loss.",
            HEADS,
            auto="the network's own",
        ),
        S("head_scale", "float", 15.0, "Scale of hypersphere logits.", low=0, low_open=True),
        S(
            "angular_margin",
            "float",
            None,
            "Margin on the cosine of the true class (standard, at, free-at, trades, mart).",
            low=0,
            auto="0.2 with --head hypersphere where there is one, else 0",
        ),
        S(
            "validation",
            "float",
            0.1,
            "Share held out to choose the best epoch.",
            low=0,
            low_open=True,
        ),
        S("split_seed", "int", 0, "Seed of the train / validation / test split.", low=0),
        *reading(skip_bad=False, stream="auto"),
        S(
            "augment",
            "choice",
            "none",
            "Random changes of training images; cifar: pad by 4 (small images: an eighth) and crop,"
            " flip.",
            AUGMENTATIONS,
        ),
        S("mixup", "float", 0.0, "Alpha of mixup (standard, at, trades, ...); 0: none.", low=0),
        S("cutmix", "float", 0.0, "Alpha of cutmix; with mixup, one of the two per batch.", low=0),
        S(
            "extra_data",
            "text",
            None,
            "More training data, such as generated images: .npz of x_train, y_train.",
            auto="none",
        ),
        S(
            "extra_ratio",
            "float",
            0.3,
            "Share of every batch that comes from --extra-data.",
            low=0,
            high=1,
            low_open=True,
        ),
    ),
    *DEFENSE,
    *ATTACK,
    *grouped(
        "optimization",
        S("epochs", "int", 20, "Epochs.", low=1),
        S("batch_size", "int", 64, "Examples per step.", low=1),
        S("optimizer", "choice", "adam", "Optimizer.", ("adam", "sgd")),
        S(
            "learning_rate",
            "float",
            None,
            "Largest learning rate.",
            low=0,
            low_open=True,
            auto="0.001 for adam, 0.1 for sgd",
        ),
        S(
            "lr_schedule",
            "choice",
            "constant",
            "Learning rate: steps falls at --lr-epochs; cosine and cyclic end at 0.",
            ("constant", "steps", "cosine", "cyclic"),
        ),
        S(
            "lr_epochs",
            "ints",
            None,
            "Epochs from whose start on the learning rate is multiplied by --lr-factor.",
            low=1,
            auto="none",
        ),
        S("lr_factor", "float", 0.1, "Factor of each fall.", low=0, low_open=True),
        S("lr_warmup", "int", 0, "Epochs over which the learning rate grows to its value.", low=0),
        S("momentum", "float", 0.9, "Momentum of sgd.", low=0, high=1),
        S("nesterov", "bool", False, "Nesterov momentum of sgd."),
        S(
            "weight_decay",
            "float",
            0.0,
            "Weight decay: decoupled for adam, L2 inside the momentum for sgd.",
            low=0,
        ),
        S(
            "weight_decay_of",
            "choice",
            "all",
            "Decay every weight, as the published recipes do, or spare biases and BatchNorm.",
            ("all", "kernels"),
        ),
        S("clip_norm", "float", 0.0, "Bound of the gradient's norm; 0: none.", low=0),
        S(
            "label_smoothing",
            "float",
            0.0,
            "Share of the other classes in the outer cross-entropy (not mart, mail-mart).",
            low=0,
            high=0.999,
        ),
        S(
            "averaging",
            "choice",
            "none",
            "Average the weights; validation, best.keras and last.keras then use the average.",
            ("none", "ema", "swa"),
        ),
        S("averaging_decay", "float", 0.995, "Decay of ema.", low=0, high=0.999999),
        S(
            "averaging_start",
            "int",
            None,
            "Epoch at whose start averaging begins.",
            low=1,
            auto="1 for ema; three quarters of the epochs for swa, a sample each",
        ),
        S(
            "averaging_statistics",
            "choice",
            None,
            "Moving statistics of BatchNorm: those in training, or averaged as well.",
            ("copy", "average"),
            auto="copy for ema, average for swa",
        ),
        S("awp", "float", 0.0, "Gamma of adversarial weight perturbation; 0: none.", low=0),
        S(
            "awp_warmup",
            "int",
            None,
            "Epochs without it at the start.",
            low=0,
            auto="0 for at; else 10, but a fifth of shorter runs",
        ),
        S(
            "early_stopping",
            "int",
            None,
            "End after so many epochs without a better one on validation data.",
            low=1,
            auto="never",
        ),
        S(
            "overfitting_guard",
            "float",
            None,
            "End when validation robust accuracy falls so far below its best; 1: never.",
            low=0,
            high=1,
            low_open=True,
            auto="0.2 with single-step attacks (fgsm, fast-fgsm), else never",
        ),
        S(
            "precision",
            "choice",
            "float32",
            "Precision of the outer step.",
            ("float32", "mixed_bfloat16", "mixed_float16"),
        ),
    ),
    *grouped(
        "evaluation",
        S("val_steps", "int", 20, "Steps of the validation attack.", low=1),
        S("eval_steps", "int", 50, "PGD steps of the final evaluation.", low=1),
        S("eval_restarts", "int", 5, "PGD restarts of the final evaluation.", low=1),
        S("baseline", "bool", True, "Also train a standard model to compare with."),
    ),
    *grouped(
        "devices",
        S(
            "distribute",
            "choice",
            "none",
            "Share every batch among devices; --batch-size stays that of all together.",
            ("none", "data"),
        ),
        S(
            "devices",
            "int",
            None,
            "Devices of this machine; without an accelerator, virtual ones of its CPU.",
            low=1,
            auto="all accelerators, or the CPU",
        ),
        S(
            "coordinator",
            "text",
            None,
            "HOST:PORT of process 0, where there are several (jax, torch).",
            auto="one process, or as torchrun or TF_CONFIG say",
        ),
        S("processes", "int", None, "How many processes.", low=1, auto="see --coordinator"),
        S("process", "int", None, "Which this is, from 0.", low=0, auto="see --coordinator"),
        S(
            "join_timeout",
            "float",
            60.0,
            "Seconds to wait for the other processes.",
            low=0,
            low_open=True,
        ),
    ),
    *grouped(
        "run",
        S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
        S("seed", "int", 0, "Seed of weights, noise and order.", low=0, high=SEEDS - 1),
        S("tensorboard", "bool", False, "Also write scalars for TensorBoard to RUN/tensorboard."),
        S("out", "text", None, "Run folder.", auto="a new folder under runs/"),
        S(
            "checkpoint_every",
            "text",
            "10m",
            "Time (90s, 10m, 2h) or steps (500steps) between checkpoints inside an epoch; there is"
            " one at each epoch's end, too.",
            check=check_interval,
        ),
    ),
]
