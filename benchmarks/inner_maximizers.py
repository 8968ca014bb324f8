"""Learned inner maximizers against PGD: as attacks on a frozen model, and as trainers of one.

    python benchmarks/inner_maximizers.py --data digits --epsilon 0.15 --epochs 20 --seeds 0,1,2

For every seed the small CNN is trained with AT and TRADES, with PGD-10 and with a learned
maximizer of 10 steps (RNN-Adv, RNN-TRADES). Every model is judged on the test set by attacks that
none was trained with: PGD-100x5 on cross-entropy and on the margin. On the AT model as it is
fresh maximizers (--frozen) are trained as well, with Adam, 1e-2 in cosine decay, and the test
cross-entropy after their 10 steps compared with PGD-10's, with the best of eight step sizes and
the better of two starts *for that test set*.
"""

import argparse
import json

import keras
import numpy as np

import keras_emr as ke
from keras_emr.data.batches import TrainBatches
from keras_emr.evaluation.inner_loss import InnerLossMeter

STEP_SIZES = (0.1, 0.15, 0.2, 0.25, 0.35, 0.5, 0.75, 1.0)
STEPS = 10

METHODS = {
    "AT": ("at", None),
    "RNN-Adv (lstm)": ("at", "lstm"),
    "RNN-Adv (rnn)": ("at", "rnn"),
    "TRADES": ("trades", None),
    "RNN-TRADES (lstm)": ("trades", "lstm"),
    "RNN-TRADES (rnn)": ("trades", "rnn"),
}


def train(defense, cell, data, options, seed):
    keras.utils.set_random_seed(seed)
    model = ke.small_cnn(data.image_shape, data.classes)
    epsilon = options.epsilon
    attack = ke.PGD(epsilon, steps=STEPS)
    if cell:
        attack = ke.LearnedAttack.named(cell, epsilon, learn_share=options.learn_share)
    batches = TrainBatches(data.x_train, data.y_train, options.batch_size, seed)
    robust = ke.RobustClassifier(model, defense, attack=attack, seed=seed)
    robust.compile(keras.optimizers.Adam(1e-3))
    robust.fit(batches, epochs=options.epochs, shuffle=False, verbose=0)
    return model


def judge(model, data, options, seed):
    """Clean accuracy, and accuracy under PGD-100x5 on both objectives, in percent."""
    found, both = {}, True
    for objective in ("cross_entropy", "margin"):
        attack = ke.PGD(options.epsilon, steps=100, restarts=5, objective=objective)
        result = ke.evaluate_attack(model, attack, data.x_test, data.y_test, seed=seed)
        found["clean"] = 100 * result.accuracy
        found[objective] = 100 * result.robust_accuracy
        both = both & result.robust
    found["both"] = 100 * float(both.mean())
    return found


def final_loss(model, attack, data):
    """Mean test cross-entropy after the attack's steps; attacks with the same start share it."""
    meter = InnerLossMeter(model, attack, batch_size=len(data.x_test))
    return float(meter.curve(data.x_test, data.y_test, seed=0).loss[-1])


def frozen(model, data, options, seed):
    """Test cross-entropy after ten steps of each attack on the model as it is."""
    epsilon = options.epsilon
    found = {}
    tuned = [
        final_loss(model, ke.PGD(epsilon, steps=STEPS, step_size=a * epsilon, start=start), data)
        for a in STEP_SIZES
        for start in ("uniform", "gaussian")
    ]
    found["pgd"] = final_loss(model, ke.PGD(epsilon, steps=STEPS), data)
    found["pgd, tuned"] = max(tuned)
    found["apgd"] = final_loss(model, ke.APGD(epsilon, steps=STEPS), data)
    found["line-search"] = final_loss(model, ke.LineSearch(epsilon, steps=STEPS), data)
    for name in options.frozen.split(","):
        kind, _, share = name.partition("@")
        cell, _, preprocessing = kind.partition("/")
        maximizer = ke.LearnedMaximizer(cell, preprocessing=preprocessing or "rms", seed=seed)
        chosen = {"start": options.start, "learn_share": float(share or options.learn_share)}
        attack = ke.LearnedAttack(epsilon, maximizer=maximizer, steps=STEPS, **chosen)
        batches = TrainBatches(data.x_train, data.y_train, options.batch_size, seed)
        updates = options.fit_epochs * len(batches)
        rate = keras.optimizers.schedules.CosineDecay(1e-2, updates)
        robust = ke.RobustClassifier(model, "at", attack=attack, seed=seed)
        robust.compile(maximizer_optimizer=keras.optimizers.Adam(rate, global_clipnorm=1.0))
        robust.fit_maximizer(batches, epochs=options.fit_epochs, shuffle=False, verbose=0)
        found[name] = final_loss(model, attack, data)
    found["pgd-100"] = final_loss(model, ke.PGD(epsilon, steps=100, step_size=0.1 * epsilon), data)
    return found


def spread(rows, digits):
    values = np.array(rows)
    return f"{values.mean():.{digits}f} ({values.min():.{digits}f} to {values.max():.{digits}f})"


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--data", default="digits")
    parser.add_argument("--epsilon", type=float, default=0.15)
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--fit-epochs", type=int, default=30, help="of phi on the frozen model")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--n-train", type=int, help="the first N training images only")
    parser.add_argument("--n-test", type=int, help="the first N test images only")
    parser.add_argument("--cells", default="lstm,rnn", help="to train classifiers with")
    parser.add_argument(
        "--frozen",
        default="lstm,lstm/log_sign,rnn,rnn/log_sign",
        help="to attack the AT model with: cell[/preprocessing][@learn share]",
    )
    parser.add_argument("--learn-share", type=float, default=1.0, help="images phi learns from")
    parser.add_argument("--start", default="uniform", help="of the learned attacks on the AT model")
    parser.add_argument("--json", help="write every number there")
    options = parser.parse_args()
    data = ke.load_data(options.data)
    parts = {
        "x_train": data.x_train[: options.n_train],
        "y_train": data.y_train[: options.n_train],
        "x_test": data.x_test[: options.n_test],
        "y_test": data.y_test[: options.n_test],
    }
    data = argparse.Namespace(**parts, image_shape=data.image_shape, classes=data.classes)
    cells = options.cells.split(",")
    methods = {n: m for n, m in METHODS.items() if m[1] is None or m[1] in cells}
    judged, losses = {name: [] for name in methods}, []
    for seed in map(int, options.seeds.split(",")):
        for name, (defense, cell) in methods.items():
            model = train(defense, cell, data, options, seed)
            judged[name].append(judge(model, data, options, seed))
            print(seed, name, judged[name][-1], flush=True)
            if name == "AT":
                losses.append(frozen(model, data, options, seed))
                print(seed, "frozen", losses[-1], flush=True)
    print(f"\n{keras.backend.backend()}, {vars(options)}")
    print("| method | clean % | PGD-100x5 % | margin-100x5 % | both % |\n|---|---|---|---|---|")
    for name, rows in judged.items():
        cells = [spread([r[k] for r in rows], 1) for k in rows[0]]
        print(f"| {name} | {' | '.join(cells)} |")
    print("\n| attack on the AT model, 10 steps | test cross-entropy |\n|---|---|")
    for name in losses[0]:
        print(f"| {name} | {spread([row[name] for row in losses], 3)} |")
    for name in options.frozen.split(","):
        gains = [row[name] - row["pgd, tuned"] for row in losses]
        print(f"{name} - pgd, tuned: {spread(gains, 3)}")
    if options.json:
        with open(options.json, "w") as file:
            json.dump(
                {"options": vars(options), "judged": judged, "frozen": losses}, file, indent=2
            )


if __name__ == "__main__":
    main()
