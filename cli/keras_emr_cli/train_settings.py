"""Every option of ``keras-emr train``."""

from __future__ import annotations

from keras_emr.attacks import ATTACKS, TRAINED_ATTACKS, TRAINING_ATTACKS
from keras_emr.defenses import DEFENSES
from keras_emr.models import MODELS
from keras_emr_cli.settings import Setting

BACKENDS = ("tensorflow", "jax", "torch")
# As keras_emr.maximizers.preprocessing has them, which imports keras.
PREPROCESSINGS = ("rms", "sign", "raw", "max_abs", "log_sign", "adam_ratio")
NORMS = ("linf", "l2")
SEEDS = 2**31  # what Keras accepts on every backend
# As keras_emr.data.augment has them, which imports numpy.
AUGMENTATIONS = ("none", "cifar")


def mail_burn_in(s):
    """Unweighted epochs of MAIL: as set, else the released schedule's 76 of every 120 epochs."""
    return round(s.epochs * 76 / 120) if s.mail_burn_in is None else s.mail_burn_in


def _group(name, *settings):
    return [Setting(**{**vars(setting), "group": name}) for setting in settings]


S = Setting


def _reading(skip_bad=None, stream=None):
    """How data are read; without defaults where a run may say it."""
    run = None if stream else "the run's, or "
    return [
        S(
            "image_size",
            "text",
            None,
            "HxW that pictures are resized to.",
            auto="the size that all have" if stream else "the run's, or the size that all have",
        ),
        S(
            "skip_bad",
            "bool",
            skip_bad,
            "Leave out pictures that cannot be used, and say so.",
            auto=run and run + "no",
        ),
        S(
            "stream",
            "choice",
            stream,
            "Read pictures and TFDS batch by batch; auto: above 2 GiB.",
            ("auto", "always", "never"),
            auto=run and run + "auto",
        ),
        S(
            "tfds_dir",
            "text",
            None,
            "Folder of prepared TFDS data sets.",
            auto="TFDS_DATA_DIR, or ~/tensorflow_datasets",
        ),
    ]


READING = _reading()
TRAIN = [
    *_group(
        "data and model",
        S(
            "data",
            "text",
            "digits",
            "Data set: digits, FILE.npz, a folder of MNIST idx files or of class folders of"
            " pictures, restricted-imagenet:FOLDER, or tfds:NAME[:VERSION].",
        ),
        S("model", "choice", "small-cnn", "Network to train.", MODELS.names),
        S(
            "validation",
            "float",
            0.1,
            "Share held out to choose the best epoch.",
            low=0,
            low_open=True,
        ),
        S("split_seed", "int", 0, "Seed of the train / validation / test split.", low=0),
        *_reading(skip_bad=False, stream="auto"),
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
    *_group(
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
    *_group(
        "attack in training",
        S(
            "attack",
            "choice",
            "pgd",
            "Inner maximiser; from lstm on, one that is trained with the classifier.",
            [*TRAINING_ATTACKS, *TRAINED_ATTACKS],
        ),
        S("epsilon", "ratio", "0.15", "Radius of the ball in [0, 1] units, e.g. 8/255.", low=0),
        S("norm", "choice", "linf", "Norm of the ball.", NORMS),
        S(
            "steps",
            "int",
            None,
            "Attack steps (all but fgsm).",
            low=1,
            auto="10; the generators have their own",
        ),
        S(
            "step_size",
            "ratio",
            None,
            "Length of a step (pgd, bim).",
            low=0,
            auto="2.5 epsilon / steps for linf, 2 epsilon / steps for l2; bim 1/255",
        ),
        S(
            "start",
            "choice",
            None,
            "Start of the attack (all but fgsm, bim).",
            ("uniform", "gaussian", "none", "odi"),
            auto="what the defense prescribes; gaussian for trained attacks",
        ),
        S("restarts", "int", 1, "Restarts in training (pgd, apgd, line-search).", low=1),
        S(
            "attack_objective",
            "choice",
            None,
            "What the attack maximises.",
            ("cross_entropy", "kl", "margin", "probability"),
            auto="what the defense prescribes; probability for gat",
        ),
        S(
            "attack_mode",
            "choice",
            "inference",
            "Mode of the network while attacked in training.",
            ("inference", "training"),
        ),
    ),
    *_group(
        "learned maximizer",
        S(
            "maximizer",
            "text",
            None,
            "Take up a trained maximizer: a run, or its maximizer.keras.",
            auto="a fresh one",
        ),
        S(
            "maximizer_update",
            "choice",
            "joint",
            "When it is trained: with the classifier, on an attack of its own, or never.",
            ("joint", "alternating", "frozen"),
        ),
        S(
            "maximizer_warmup",
            "int",
            0,
            "Batches on which it is trained alone before the first epoch.",
            low=0,
        ),
        S(
            "maximizer_learning_rate",
            "float",
            0.01,
            "Learning rate of its Adam.",
            low=0,
            low_open=True,
        ),
        S("maximizer_clip", "float", 1.0, "Bound of its gradient's norm; 0: none.", low=0),
        S("hidden", "int", 10, "Hidden size (lstm, rnn).", low=1),
        S("maximizer_layers", "int", 1, "Cells on top of one another (lstm, rnn).", low=1),
        S(
            "preprocessing",
            "choice",
            "rms",
            "What it sees of a gradient (lstm, rnn).",
            PREPROCESSINGS,
        ),
        S("maximizer_output", "choice", "linear", "Its output (lstm, rnn).", ("linear", "tanh")),
        S(
            "maximizer_scale",
            "ratio",
            None,
            "Length of a step of 1.",
            low=0,
            low_open=True,
            auto="epsilon",
        ),
        S("generator_width", "int", 32, "Channels of a generator.", low=1),
        S("generator_depth", "int", 3, "Hidden convolutions of a generator.", low=1),
        S(
            "step_weights",
            "choice",
            None,
            "Weights of the steps in its objective.",
            ("linear", "uniform", "last"),
            auto="linear; last for the generators",
        ),
        S("start_noise", "float", 0.001, "Noise of its gaussian start.", low=0),
        S("bptt_horizon", "int", None, "Steps its gradients reach back.", low=1, auto="all"),
        S("straight_through", "bool", False, "Let its gradients pass clipped pixels."),
    ),
    *_group(
        "effective margin regularization",
        S("emr", "float", 0.01, "Weight lambda of EMR; 0 turns it off.", low=0),
        S(
            "emr_preset",
            "choice",
            None,
            "Released recipe; sets lambda, temperature, reduction and decay.",
            (
                "at-emr-released",
                "trades-emr-released",
                "mail-at-emr-released",
                "mail-trades-emr-released",
            ),
            auto="none",
        ),
        S(
            "emr_weighting",
            "choice",
            "softmax",
            "Which combination of the logits.",
            (
                "softmax",
                "predicted",
                "true",
                "sampled",
                "uniform",
                "runner_up_difference",
                "rademacher",
                "sphere",
                "exact",
            ),
        ),
        S(
            "emr_temperature",
            "float",
            1.0,
            "Temperature of the softmax weights.",
            low=0,
            low_open=True,
        ),
        S("emr_center", "bool", False, "Ignore what is common to all logits."),
        S("emr_norm", "choice", "l2", "Norm of the input gradient.", ("l2", "l1", "linf")),
        S("emr_power", "choice", "2", "Power of that norm.", ("2", "1")),
        S(
            "emr_reduction",
            "choice",
            "mean",
            "Batch mean, or the release's mean / batch size.",
            ("mean", "released"),
        ),
        S(
            "emr_at",
            "choice",
            None,
            "Where the gradient is taken.",
            ("adversarial", "clean", "both"),
            auto="adversarial; clean for standard training",
        ),
        S(
            "emr_bn_mode",
            "choice",
            "inference",
            "BatchNorm statistics of the penalty.",
            ("inference", "batch"),
        ),
        S(
            "emr_estimator",
            "choice",
            "double_backprop",
            "How the penalty is differentiated.",
            ("double_backprop", "finite_difference"),
        ),
        S("emr_step", "float", 0.01, "Step of the finite difference.", low=0, low_open=True),
        S("emr_central", "bool", False, "Central finite difference."),
        S(
            "emr_decay_epochs",
            "ints",
            None,
            "Multiply lambda by 0.1 from these epochs on.",
            auto="never",
        ),
        S(
            "emr_warmup",
            "int",
            None,
            "Epochs over which lambda grows to its value.",
            low=1,
            auto="none",
        ),
    ),
    *_group(
        "optimization",
        S("epochs", "int", 20, "Epochs.", low=1),
        S("batch_size", "int", 64, "Examples per step.", low=1),
        S("optimizer", "choice", "adam", "Optimizer.", ("adam", "sgd")),
        S("learning_rate", "float", 0.001, "Learning rate.", low=0, low_open=True),
        S("momentum", "float", 0.9, "Momentum of sgd.", low=0, high=1),
        S("weight_decay", "float", 0.0, "Decoupled decay of every weight, biases included.", low=0),
        S(
            "precision",
            "choice",
            "float32",
            "Precision of the outer step.",
            ("float32", "mixed_bfloat16", "mixed_float16"),
        ),
    ),
    *_group(
        "evaluation",
        S("val_steps", "int", 20, "Steps of the validation attack.", low=1),
        S("eval_steps", "int", 50, "PGD steps of the final evaluation.", low=1),
        S("eval_restarts", "int", 5, "PGD restarts of the final evaluation.", low=1),
        S("baseline", "bool", True, "Also train a standard model to compare with."),
    ),
    *_group(
        "run",
        S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
        S("seed", "int", 0, "Seed of weights, noise and order.", low=0, high=SEEDS - 1),
        S("out", "text", None, "Run folder.", auto="a new folder under runs/"),
    ),
]

EVALUATE = [
    S("data", "text", None, "Data set.", auto="the run's"),
    *READING,
    S("split_seed", "int", None, "Seed of the split.", low=0, auto="the run's, or 0"),
    S(
        "attacks",
        "names",
        "autoattack",
        "Attacks, separated by commas. cw: PGD on the margin; apgd-ce, apgd-dlr: as in AutoAttack.",
        (
            *("autoattack", "autoattack-plus", "autoattack-rand"),
            *("apgd-ce", "apgd-dlr", "cw"),
            *ATTACKS.names,
        ),
    ),
    S(
        "survivors",
        "bool",
        False,
        "Run each attack only on what the ones before left, as AutoAttack does.",
    ),
    S(
        "maximizer",
        "text",
        None,
        "Maximizer of the attack learned: a run, or its maximizer.keras.",
        auto="the run's own",
    ),
    S(
        "times",
        "ints",
        [1],
        "Steps of the attack learned, in multiples of its training's.",
        low=1,
    ),
    S(
        "surrogates",
        "text",
        "",
        "Models of the attack transfer and for checks, separated by commas.",
    ),
    S(
        "epsilon",
        "ratio",
        None,
        "Radius of the ball in [0, 1] units, e.g. 8/255.",
        low=0,
        low_open=True,
        auto="the run's",
    ),
    S("norm", "choice", None, "Norm of the ball.", NORMS, auto="the run's, or linf"),
    S(
        "steps",
        "int",
        None,
        "Steps of the attacks that are named one by one.",
        low=1,
        auto="50 for pgd, cw, apgd and line-search, else the attack's own",
    ),
    S(
        "restarts",
        "int",
        None,
        "Restarts of the attacks that are named one by one.",
        low=1,
        auto="5 for pgd, cw, apgd, line-search and learned, else 1",
    ),
    S(
        "start",
        "choice",
        "uniform",
        "Start of pgd, cw, apgd and line-search.",
        ("uniform", "gaussian", "none", "odi"),
    ),
    S(
        "step_size",
        "ratio",
        None,
        "Length of a step of pgd and cw.",
        low=0,
        auto="2.5 epsilon / steps for linf, 2 epsilon / steps for l2",
    ),
    S(
        "objective",
        "choice",
        "cross_entropy",
        "What pgd, apgd, line-search, fgsm, bim, mi-fgsm and learned maximise.",
        ("cross_entropy", "margin", "dlr"),
    ),
    S("n_examples", "int", None, "The first N test images.", low=1, auto="all"),
    S(
        "extra_examples",
        "int",
        200,
        "Curves and checks use the first so many of these; 0: leave them out.",
        low=0,
    ),
    S("batch_size", "int", None, "Images at a time.", low=1, auto="what fits in about 1 GiB"),
    S(
        "time_budget",
        "float",
        None,
        "Seconds for the attacks; then stop, to go on another time.",
        low=0,
        auto="no limit",
    ),
    S("backend", "choice", "tensorflow", "Keras backend.", BACKENDS),
    S("seed", "int", 0, "Seed of the attacks.", low=0, high=SEEDS - 1),
    S("out", "text", None, "Folder for the report.", auto="RUN/report, or NAME-report"),
    S(
        "url",
        "text",
        None,
        "Attack the model served there, only by asking: http://HOST:8501/v1/models/NAME.",
        auto="none",
    ),
    S("grpc", "bool", False, "With --url: gRPC at that host and port."),
    S("timeout", "float", 30.0, "With --url: seconds for a request.", low=0, low_open=True),
    S("retries", "int", 6, "With --url: how often to ask again.", low=0, high=100),
    S("ca", "text", None, "With --url: PEM file of the certificates to trust.", auto="usual"),
    S("certificate", "text", None, "With --url: PEM file of this client.", auto="none"),
    S("key", "text", None, "With --url: PEM file of its key.", auto="none"),
]

EXPORT = [
    S("name", "text", None, "Name of the model in the store.", auto="the run's, or the file's"),
    S("version", "text", "auto", "A number, or auto: the highest so far + 1."),
    S("data", "text", None, "Data set.", auto="the run's"),
    *READING,
    S("split_seed", "int", None, "Seed of the split.", low=0, auto="the run's, or 0"),
    S(
        "epsilon",
        "ratio",
        None,
        "Radius of the ball in [0, 1] units, e.g. 8/255.",
        low=0,
        low_open=True,
        auto="the run's, or 8/255",
    ),
    S("norm", "choice", None, "Norm of the ball.", NORMS, auto="the run's, or linf"),
    S(
        "keep",
        "float",
        0.95,
        "Share of right validation predictions that stay trusted.",
        low=0,
        high=1,
        low_open=True,
    ),
    S(
        "backend",
        "choice",
        None,
        "Keras backend that the model was trained on, for the parity gate.",
        BACKENDS,
        auto="the run's, or tensorflow",
    ),
]
