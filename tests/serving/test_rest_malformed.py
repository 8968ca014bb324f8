"""Whatever a client sends: never a crash, never a 500, and the next good request is answered."""

import gzip
import json
import random
from pathlib import Path

import pytest
import requests
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

CASES = json.loads((Path(__file__).parent / "rest_cases.json").read_text())
# The jit signature is refused with 500 whoever asks: TF Serving's own answer.
BODIES = [case["body"] for case in CASES if '"jit"' not in case["body"]]
BOUNDED = settings(
    max_examples=150,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)
LEAVES = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-(2**70), 2**70),
    st.floats(),
    st.text(max_size=5),
    st.builds(lambda text: {"b64": text}, st.text("aGk=_ .", max_size=6)),
)
VALUES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=4),
        st.dictionaries(st.sampled_from(["x", "label", "b64", "y", ""]), inner, max_size=3),
    ),
    max_leaves=12,
)
NAMES = ["serving_default", "multi", "two", "image", "scalar", "ints", "classify", "regress", ""]
REQUESTS = st.fixed_dictionaries(
    {},
    optional={
        "signature_name": st.sampled_from(NAMES) | LEAVES,
        "instances": VALUES,
        "inputs": VALUES,
        "examples": VALUES,
        "context": VALUES,
    },
)


@pytest.fixture
def ask(url):
    session = requests.Session()

    def post(verb, body, headers=None):
        path = f"{url}/v1/models/m:{verb}"
        answer = session.post(path, data=body, headers=headers, timeout=30)
        assert answer.status_code in (200, 400, 404, 501), (verb, body, answer.text)
        if answer.status_code != 200:
            assert set(answer.json()) == {"error"}
        return answer

    yield post
    good = post("predict", '{"instances": [[1, 2, 3]]}')
    assert good.json() == {"predictions": [[22.0, 28.0]]}


@BOUNDED
@given(st.sampled_from(["predict", "classify", "regress"]), REQUESTS)
def test_any_values(ask, verb, content):
    ask(verb, json.dumps(content).encode(errors="surrogatepass"))


@BOUNDED
@given(st.binary(max_size=60))
def test_any_bytes(ask, body):
    ask("predict", body)


PIECES = [
    *(b"[", b"{", b'"', b"1e400", b"\xff", b"null", b"-", b"\\u", b"9" * 400, b"[" * 200, b"NaN"),
    *(b'{"b64":"', b'{"b64":"@@"}', b'{"b64":"aGk"}', b'"\\ud800"', b"\x00", b'{"a":' * 130),
]


def mutated(rng, body):
    """One recorded body, cut, doubled or with bytes replaced."""
    data = bytearray(body.encode())
    for _ in range(rng.randint(1, 3)):
        kind, at = rng.randrange(4), rng.randrange(len(data) + 1)
        if kind == 0:
            del data[at:]
        elif kind == 1:
            data[at:at] = rng.choice(PIECES)
        elif kind == 2:
            del data[at : at + rng.randint(1, 4)]
        else:
            data[at:at] = data[: rng.randint(0, 20)]
    return bytes(data)


def packed(rng, data):
    """The body as gzip, a third of them with a few bytes changed, or cut."""
    data = bytearray(gzip.compress(data))
    if rng.random() < 0.3:
        at = rng.randrange(len(data))
        data[at : at + rng.randrange(3)] = rng.randbytes(rng.randrange(3))
    return bytes(data[: rng.randrange(len(data)) if rng.random() < 0.1 else None])


def mutations(count):
    """(verb, body, headers), one in ten as gzip."""
    rng = random.Random(0)
    for _ in range(count):
        verb = rng.choice(["predict", "classify", "regress"])
        body, headers = mutated(rng, rng.choice(BODIES)), None
        if rng.random() < 0.1:
            body, headers = packed(rng, body), {"Content-Encoding": "gzip"}
        yield verb, body, headers


def test_mutated_requests(ask):
    for one in mutations(300):
        ask(*one)


@pytest.mark.slow
def test_ten_thousand_mutated_requests(ask):
    for one in mutations(10_000):
        ask(*one)


@pytest.mark.parametrize(
    "body",
    [
        '{"instances": [' + "1," * 100_000 + "1]}",
        '{"inputs": ' + "[" * 70 + "1" + "]" * 70 + "}",
        '{"instances": [' + "9" * 5000 + "]}",
        '{"instances": [1e-999]}',
        json.dumps({"signature_name": "x" * 100_000, "instances": [1]}),
        '{"instances": "' + "\\" * 99_999 + '"}',
    ],
    ids=["long", "rank 70", "digits", "tiny", "long name", "backslashes"],
)
def test_outsized_requests(ask, body):
    assert ask("predict", body).status_code == 400
