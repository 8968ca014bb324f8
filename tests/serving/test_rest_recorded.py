"""Every recorded answer of TensorFlow Serving, over HTTP."""

import json
from pathlib import Path

import pytest
import requests

CASES = json.loads((Path(__file__).parent / "rest_cases.json").read_text())


def canonical(text):
    """The JSON value; an error's text up to its first line break, which node names follow."""
    value = json.loads(text)
    if isinstance(value, dict) and set(value) == {"error"}:
        quoted = "JSON Value: " in value["error"]
        return value if quoted else {"error": value["error"].split("\n")[0]}
    return value


@pytest.mark.parametrize("case", CASES, ids=[f"{c['verb']}-{c['body'][:60]}" for c in CASES])
def test_recorded(url, case):
    answer = requests.post(f"{url}/v1/models/m:{case['verb']}", data=case["body"], timeout=30)
    assert answer.status_code == case["status"], answer.text
    assert canonical(answer.text) == canonical(case["response"])
    assert answer.headers["content-type"] == "application/json"


def test_the_layout_of_a_row_answer_is_the_recorded_one(url):
    body = '{"instances":[[1,2,3],[0.1,0.25,9000000]]}'
    (case,) = (case for case in CASES if case["body"] == body)
    answer = requests.post(f"{url}/v1/models/m:predict", data=body, timeout=30)
    assert answer.text == case["response"]


def test_the_layout_of_a_column_answer_is_the_recorded_one(url):
    (case,) = (case for case in CASES if case["body"] == '{"inputs":[[1,2,3]]}')
    answer = requests.post(f"{url}/v1/models/m:predict", data=case["body"], timeout=30)
    assert answer.text == case["response"]


def test_the_layout_of_a_classification_is_the_recorded_one(url):
    case = next(case for case in CASES if case["verb"] == "classify" and case["status"] == 200)
    answer = requests.post(f"{url}/v1/models/m:classify", data=case["body"], timeout=30)
    assert answer.text == case["response"]
