"""Square: worked values, and every image it asks for against a loop over pixels."""

import math

import keras
import numpy as np
import pytest

from keras_emr.attacks import ATTACKS
from keras_emr.attacks.square import Square, window_share, window_side
from keras_emr.attacks.square_windows import pattern
from keras_emr.errors import UserError
from tests.blackbox.models import (
    Asked,
    Linear,
    Wavy,
    assert_alone_as_together,
    assert_feasible,
    margin,
    streams,
)

# ---------------------------------------------------------------- worked values

SCHEDULE = [
    *[(0, 1), (10, 1), (11, 2), (50, 2), (51, 4), (200, 4), (201, 8), (500, 8), (501, 16)],
    *[(1000, 16), (1001, 32), (2000, 32), (2001, 64), (4000, 64), (4001, 128), (4999, 128)],
    *[(6000, 128), (6001, 256), (8000, 256), (8001, 512), (10**6, 512)],
]


@pytest.mark.parametrize("iteration, divisor", SCHEDULE)
def test_share_of_the_image(iteration, divisor):
    assert window_share(iteration, 0.8) == 0.8 / divisor


def test_side_of_the_window():
    shares = [0.8 / 2**k for k in range(10)]
    assert [window_side(s, 28, 28, "linf") for s in shares] == [25, 18, 13, 9, 6, 4, 3, 2, 2, 1]
    assert [window_side(s, 28, 28, "l2") for s in shares] == [25, 19, 13, 9, 7, 5, 3, 3, 3, 3]
    assert window_side(1.0, 30, 4, "linf") == window_side(1.0, 30, 4, "l2") == 4
    assert window_side(1e-9, 4, 4, "linf") == 1
    assert window_side(1e-9, 2, 7, "l2") == 2


def test_schedule_is_rescaled_only_on_request():
    plain, rescaled = Square(0.3, steps=100), Square(0.3, steps=100, rescale=True)
    assert [plain.side(i, 28, 28) for i in (0, 10, 11, 50, 51, 99)] == [25, 25, 18, 18, 13, 13]
    # As iterations 0, 100, 200, 300, 1000, 1100, 8000, 8100 of 10000.
    at = (0, 1, 2, 3, 10, 11, 80, 81)
    assert [rescaled.side(i, 28, 28) for i in at] == [25, 13, 13, 9, 6, 4, 2, 1]
    assert Square(0.3, steps=7, rescale=True).side(6, 28, 28) == 1  # as 8571


def test_pattern_by_hand():
    top = np.array([[0.25, 1.25, 0.25]]) / math.sqrt(1.6875)
    bottom = np.array([[0.25, 0.25, 0.25], [0.25, 1.25, 0.25]]) / math.sqrt(1.875)
    want = np.concatenate([top, -bottom]) / math.sqrt(2)
    np.testing.assert_allclose(pattern(3), want, rtol=1e-12)
    np.testing.assert_array_equal(pattern(1), [[-1.0]])


@pytest.mark.parametrize("side", [2, 3, 4, 5, 9, 24, 25])
def test_pattern_signs_and_length(side):
    eta = pattern(side)
    assert eta.shape == (side, side) and (eta[: side // 2] > 0).all()
    assert (eta[side // 2 :] < 0).all()
    np.testing.assert_allclose(np.sum(eta[: side // 2] ** 2), 0.5, rtol=1e-12)
    np.testing.assert_allclose(np.sum(eta[side // 2 :] ** 2), 0.5, rtol=1e-12)
    np.testing.assert_allclose(eta, naive_pattern(side), rtol=1e-12)
    assert pattern(side) is eta


# ---------------------------------------------------------------- against a loop over pixels


def naive_pattern(side):
    eta = np.zeros((side, side))
    for top, rows, sign in ((0, side // 2, 1), (side // 2, side - side // 2, -1)):
        block = np.zeros((rows, side))
        for ring in range(max(rows // 2, side // 2) + 1):
            for i in range(rows):
                for j in range(side):
                    if abs(i - rows // 2) <= ring and abs(j - side // 2) <= ring:
                        block[i, j] += 1 / (ring + 1) ** 2
        eta[top : top + rows] = sign * block / max(np.sqrt((block**2).sum()), 1e-12)
    return eta / np.sqrt((eta**2).sum())


def naive_side(attack, i, height, width):
    if attack.rescale:
        i = int(i / attack.steps * 10000)
    p = attack.p_init
    for limit in (10, 50, 200, 500, 1000, 2000, 4000, 6000, 8000):
        p = p / 2 if i > limit else p
    q = round(math.sqrt(p * height * width))
    if attack.norm == "linf":
        return min(max(q, 1), height, width)
    q = max(q, 3)
    return min(q + 1 if q % 2 == 0 else q, height, width)


def signed(u, channel, side):
    """Pattern of a channel from the numbers drawn for it."""
    eta = naive_pattern(side)
    eta = eta.T if u[0] < 0.5 else eta
    return eta if u[1 + channel] < 0.5 else -eta


def naive_start(x, epsilon, norm, stream):
    height, width, channels = x.shape
    if norm == "linf":
        u = stream.random((width, channels))
        image = np.zeros(x.shape)
        for i, j, c in np.ndindex(*x.shape):
            image[i, j, c] = x[i, j, c] + (epsilon if u[j, c] < 0.5 else -epsilon)
        return np.clip(image, 0, 1)
    side = height // 5
    rows, columns = height // side, width // side
    u = stream.random((rows, columns, 1 + channels))
    delta = np.zeros(x.shape)
    for r in range(rows):
        for k in range(columns):
            top = (height - rows * side) // 2 + r * side
            left = (width - columns * side) // 2 + k * side
            for c in range(channels):
                tile = signed(u[r, k], c, side)
                delta[top : top + side, left : left + side, c] = tile
    return np.clip(x + epsilon * delta / np.sqrt((delta**2).sum()), 0, 1)


def naive_linf(x, image, epsilon, q, u):
    height, width, _ = x.shape
    top, left = math.floor(u[0] * (height - q)), math.floor(u[1] * (width - q))
    new = image.copy()
    for i, j, c in np.ndindex(*x.shape):
        if top <= i < top + q and left <= j < left + q:
            moved = image[i, j, c] + (2 * epsilon if u[2 + c] < 0.5 else -2 * epsilon)
            moved = min(max(moved, x[i, j, c] - epsilon), x[i, j, c] + epsilon)
            new[i, j, c] = min(max(moved, 0), 1)
    return new


def naive_l2(x, image, epsilon, q, u):
    height, width, channels = x.shape
    a, b = math.floor(u[0] * (height - q)), math.floor(u[1] * (width - q))
    c, d = math.floor(u[2] * (height - q)), math.floor(u[3] * (width - q))
    one, two = np.zeros((height, width), bool), np.zeros((height, width), bool)
    one[a : a + q, b : b + q], two[c : c + q, d : d + q] = True, True
    delta = image - x
    spare = max(epsilon**2 - (delta**2).sum(), 0) / channels
    moved = np.where(two[:, :, None], 0, delta)
    for k in range(channels):
        inside = math.sqrt((delta[:, :, k][one | two] ** 2).sum())
        old = delta[a : a + q, b : b + q, k]
        new = signed(u[4:], k, q) + old / (1e-12 + math.sqrt((old**2).sum()))
        new = new / (1e-12 + math.sqrt((new**2).sum())) * math.sqrt(spare + inside**2)
        moved[a : a + q, b : b + q, k] = new
    return np.clip(x + epsilon * moved / np.sqrt((moved**2).sum()), 0, 1)


def rounded(image):
    return image.astype("float32").astype("float64")


def naive_square(attack, model, x, y, stream):
    """Images asked for, one after another, and the result.

    Images are rounded to float32: in L2 the square root of what ``epsilon^2`` leaves over makes
    much of the rounding.
    """
    x = x.astype("float64")
    epsilon = attack.epsilon
    if attack.norm == "l2":
        epsilon -= 2.0**-25 * math.sqrt(x.size)
    propose = naive_linf if attack.norm == "linf" else naive_l2
    width = (2 if attack.norm == "linf" else 5) + x.shape[2]
    image = rounded(naive_start(x, epsilon, attack.norm, stream))
    asked = [image]
    best = margin(y, model(image[None])[0])
    for i in range(attack.steps):
        if best <= 0:
            break
        q = naive_side(attack, i, *x.shape[:2])
        new = rounded(propose(x, image, epsilon, q, stream.random(width)))
        asked.append(new)
        value = margin(y, model(new[None])[0])
        if value < best or value <= 0:
            image, best = new, value
    return asked, image if model(image[None])[0].argmax() != y else x


@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize(
    "kind, norm, epsilon, lead",
    [
        (Linear, "linf", 0.05, 15.0),
        (Wavy, "linf", 0.008, 0.0),
        (Linear, "l2", 0.5, 15.0),
        (Wavy, "l2", 0.12, 0.0),
    ],
)
def test_every_image_against_a_loop(kind, norm, epsilon, lead, rescale):
    model = kind((6, 17, 14, 2), lead=lead, seed=3)
    attack = Square(epsilon, norm, steps=70, rescale=rescale)
    want = [
        naive_square(attack, model, x, y, s)
        for x, y, s in zip(model.x, model.y, streams(6), strict=True)
    ]
    lengths = [len(asked) for asked, _ in want]
    assert min(lengths) < 71 and max(lengths) == 71, lengths  # some are broken, not all

    query = Asked(model)
    x_adv, queries = attack.search(query, model.x, model.y, streams(6))
    assert queries.tolist() == lengths
    for t, batch in enumerate(query.batches):
        # In order, and nothing of the examples that are finished.
        expected = [asked[t] for asked, _ in want if len(asked) > t]
        np.testing.assert_allclose(batch, expected, rtol=0, atol=1e-6)
        live = [n for n, length in enumerate(lengths) if length > t]
        assert_feasible(batch, model.x[live], epsilon, norm)
    np.testing.assert_allclose(x_adv, [result for _, result in want], rtol=0, atol=1e-6)
    broken = model(x_adv).argmax(-1) != model.y
    np.testing.assert_array_equal(x_adv[~broken], model.x[~broken])
    assert 0 < broken.sum() < 6


class Coarse(Linear):
    """Logits rounded, so that there are ties."""

    def __call__(self, images):
        return np.round(super().__call__(images))


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.015), ("l2", 0.2)])
def test_ties_against_a_loop(norm, epsilon):
    """A margin as low as the best is not accepted, and 0 ends the search."""
    model = Coarse((8, 11, 9, 1), 2, seed=6)
    attack = Square(epsilon, norm, steps=60)
    examples = zip(model.x, model.y, streams(8), strict=True)
    want = [naive_square(attack, model, x, y, s) for x, y, s in examples]
    x_adv, queries = attack.search(model, model.x, model.y, streams(8))
    assert queries.tolist() == [len(asked) for asked, _ in want]
    np.testing.assert_allclose(x_adv, [result for _, result in want], rtol=0, atol=1e-6)
    last = [
        margin(y, model(asked[-1][None])[0]) for (asked, _), y in zip(want, model.y, strict=True)
    ]
    tied = (np.array(last) == 0) & (queries > 1)
    assert tied.any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
def test_candidates_start_from_the_best_image_so_far(norm):
    """Linf: what differs lies in one window. L2: what differs in direction lies in two."""
    model = Linear((1, 20, 20, 1), low=0.4, high=0.6, lead=100.0, seed=1)
    model.w[:200] = 0  # windows in the upper half do not change the margin
    attack = Square(0.1, norm, steps=300)
    query = Asked(model)
    attack.search(query, model.x, model.y, streams(1))
    images = np.concatenate(query.batches)
    margins = [margin(0, z) for z in model(images)]
    clean = model.x[0].astype("float64")
    accepted = 0
    for t in range(1, 301):
        best = images[np.argmin(margins[:t])] - clean
        delta = images[t] - clean
        side = attack.side(t - 1, 20, 20)
        if norm == "linf":
            rows, columns = np.nonzero((delta != best).any(-1))[:2]
            assert not len(rows) or max(np.ptp(rows), np.ptp(columns)) < side
        else:
            # Outside the windows all of it is scaled by one number.
            with np.errstate(divide="ignore", invalid="ignore"):
                ratio = delta / best
            scale = np.nanmedian(ratio) if side < 10 else np.nan
            same = np.abs(delta - scale * best) < 1e-6
            assert side >= 10 or (~same).sum() <= 2 * side**2
        accepted += margins[t] < min(margins[:t])
    assert accepted > 5


# ---------------------------------------------------------------- strength


@pytest.mark.parametrize("channels", [1, 3])
def test_linf_reaches_the_worst_margin_of_a_linear_model(channels):
    """At least 99.9% of ``epsilon ||w||_1``, and never more.

    The last row and column have no weight: no window of one pixel is ever drawn there.
    """
    model = Linear((4, 6, 6, channels), 2, edge=False, low=0.2, high=0.8, lead=60.0)
    query, epsilon = Asked(model), 0.1
    attack = Square(epsilon, steps=2500)
    x_adv, queries = attack.search(query, model.x, model.y, streams(4))
    best = np.min([[margin(0, z) for z in model(batch)] for batch in query.batches], axis=0)
    start = np.array([margin(0, z) for z in model(model.x)])
    most = epsilon * np.abs(model.w[:, 0] - model.w[:, 1]).sum()
    assert (best > 0).all() and (queries == 2501).all()
    assert (start - best >= 0.999 * most).all(), (start - best) / most
    assert (start - best <= most + 1e-5).all()
    np.testing.assert_array_equal(x_adv, model.x)


def test_l2_nears_the_worst_margin_of_a_linear_model():
    """At least 60% of ``epsilon ||w||_2``: patterns are never smaller than 3 x 3."""
    model = Linear((4, 6, 6, 1), 2, edge=False, low=0.3, high=0.7, lead=60.0)
    query, epsilon = Asked(model), 0.5
    Square(epsilon, "l2", steps=1500).search(query, model.x, model.y, streams(4))
    best = np.min([[margin(0, z) for z in model(batch)] for batch in query.batches], axis=0)
    start = np.array([margin(0, z) for z in model(model.x)])
    most = epsilon * np.linalg.norm(model.w[:, 0] - model.w[:, 1])
    assert (start - best >= 0.6 * most).all(), (start - best) / most
    assert (start - best <= most + 1e-5).all()


# ---------------------------------------------------------------- contract


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.01), ("l2", 0.1)])
def test_alone_as_together(norm, epsilon):
    model = Wavy((8, 11, 9, 3), seed=5)
    attack = Square(epsilon, norm, steps=80)
    x_adv, queries = assert_alone_as_together(attack, model)
    assert len(set(queries)) > 3
    assert_feasible(x_adv, model.x, epsilon, norm)


@pytest.mark.parametrize("norm, epsilon", [("linf", 0.01), ("l2", 0.1)])
def test_queries_are_the_images_asked_for(norm, epsilon):
    model = Wavy((8, 11, 9, 3), seed=5)
    query, seen = Asked(model), []
    attack = Square(epsilon, norm, steps=80)
    _, queries = attack.search(query, model.x, model.y, streams(8), seen.append)
    assert queries.tolist() == query.per_example().tolist()
    assert min(queries) < 81 == max(queries)
    assert seen == list(range(1, 81))


def test_a_tie_ends_the_search_but_is_no_success_by_itself():
    model = Linear((2, 5, 5, 1))
    query = Asked(model)
    query.model = type("Constant", (), {"x": model.x, "__call__": lambda s, a: np.ones((2, 3))})()
    x_adv, queries = Square(0.1).search(query, model.x, np.array([0, 1]), streams(2))
    assert queries.tolist() == [1, 1]
    np.testing.assert_array_equal(x_adv[0], model.x[0])  # arg-max still says 0
    assert (x_adv[1] != model.x[1]).any()


@pytest.mark.parametrize("norm", ["linf", "l2"])
@pytest.mark.parametrize("shape", [(2, 1, 1, 1), (2, 3, 2, 1), (2, 4, 9, 2)])
@pytest.mark.parametrize("epsilon", [0.0, 0.3])
def test_small_images_and_no_budget(norm, shape, epsilon):
    model = Linear(shape, lead=100.0)
    query = Asked(model)
    x_adv, queries = Square(epsilon, norm, steps=20).search(query, model.x, model.y, streams(2))
    assert queries.tolist() == [21, 21]
    np.testing.assert_array_equal(x_adv, model.x)
    for batch in query.batches:
        assert_feasible(batch, model.x, epsilon, norm)
        assert epsilon or (batch == model.x).all()


def test_defaults_are_autoattacks_and_options_survive_saving():
    attack = ATTACKS.get("square")(0.3)
    assert attack.get_config() == {
        "epsilon": 0.3,
        "norm": "linf",
        "steps": 5000,
        "p_init": 0.8,
        "rescale": False,
        "restarts": 1,
    }
    other = Square(0.5, "l2", 10, 0.3, True, 2)
    saved = keras.saving.serialize_keras_object(other)
    assert keras.saving.deserialize_keras_object(saved).get_config() == other.get_config()
    assert (attack.needs, attack.bounded, attack.evaluation_only) == ("scores", True, True)


@pytest.mark.parametrize(
    "options",
    [
        {"epsilon": None},
        {"epsilon": -1},
        {"norm": "l1"},
        {"steps": 0},
        {"p_init": 0},
        {"p_init": 1.5},
        {"p_init": "x"},
        {"rescale": "yes"},
        {"restarts": 0},
    ],
)
def test_bad_options(options):
    with pytest.raises(UserError, match=r"^[^\n]*Received: [^\n]*$"):
        Square(**{"epsilon": 0.3, **options})
