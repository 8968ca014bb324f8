"""Every option of ``keras-emr train``."""

from __future__ import annotations

from keras_emr.defenses import DEFENSES
from keras_emr.models import ACTIVATIONS, MODEL_NAMES, NORMALIZATIONS, check_model_name
from keras_emr_cli.attack_settings import ATTACK
from keras_emr_cli.reading_settings import reading
from keras_emr_cli.settings import BACKENDS, SEEDS, grouped
from keras_emr_cli.settings import Setting as S

# As keras_emr.data.augment has them, which imports numpy.
AUGMENTATIONS = ("none", "cifar")


def mail_burn_in(s):
    """Unweighted epochs of MAIL: as set, else the released schedule's 76 of every 120 epochs."""
    return round(s.epochs * 76 / 120) if s.mail_burn_in is None else s.mail_burn_in


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
            "Random changes of training images; cifar: pad by 4 and crop, flip.",
            AUGMENTATIONS,
        ),
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
    *grouped(
        "defense",
        S("defense", "choice", "trades", "Training method.", DEFENSES.names),
        S(
            "beta",
            "float",
            None,
            "Weight of the divergence (TRADES, MART, MAIL).",
            low=0,
            auto="6 for trades, 5 for mart and mail",
        ),
        S(
            "clean_weight",
            "float",
            None,
            "Share of a clean term in the loss of at.",
            low=0,
            high=0.999,
            auto="0.5 with attack gat, else 0",
        ),
        S(
            "mail_slope",
            "float",
            None,
            "MAIL: slope of the instance weight.",
            auto="10 for mail-at, 2 for the others",
        ),
        S(
            "mail_bias",
            "float",
            None,
            "MAIL: margin at which the weight is one half.",
            auto="-0.5 for mail-at, 0 for the others",
        ),
        S(
            "mail_normalization",
            "choice",
            "constant",
            "MAIL: 3 w, or weights with batch mean 1.",
            ("constant", "batch"),
        ),
        S(
            "mail_margin",
            "choice",
            "adversarial",
            "MAIL: which probabilistic margin.",
            ("adversarial", "natural", "difference"),
        ),
        S(
            "mail_burn_in",
            "int",
            None,
            "MAIL: unweighted epochs at the start.",
            low=0,
            auto="76 of every 120 epochs",
        ),
    ),
    *ATTACK,
    *grouped(
        "optimization",
        S("epochs", "int", 20, "Epochs.", low=1),
        S("batch_size", "int", 64, "Examples per step.", low=1),
        S("optimizer", "choice", "adam", "Optimizer.", ("adam", "sgd")),
        S("learning_rate", "float", 0.001, "Largest learning rate.", low=0, low_open=True),
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
        S("awp_warmup", "int", 0, "Epochs without it at the start.", low=0),
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
        "run",
        S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
        S("seed", "int", 0, "Seed of weights, noise and order.", low=0, high=SEEDS - 1),
        S("tensorboard", "bool", False, "Also write scalars for TensorBoard to RUN/tensorboard."),
        S("out", "text", None, "Run folder.", auto="a new folder under runs/"),
    ),
]
