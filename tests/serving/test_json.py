"""What the JSON codec does beyond the recorded answers; numbers are TF Serving's rules by hand."""

import json

import numpy as np
import pytest

from keras_emr_serving.server.json_request import read_predict
from keras_emr_serving.server.json_response import write_columns, write_rows
from keras_emr_serving.server.json_text import Object, decimal, dump, parse
from keras_emr_serving.server.json_values import decode_base64
from keras_emr_serving.server.status import ServingError


def read(body, **types):
    return read_predict(body.encode(), lambda name: types)


@pytest.mark.parametrize(
    ("value", "digits", "text"),
    [
        (1.0, 9, "1.0"),
        (-0.0, 9, "-0.0"),
        (0.1, 9, "0.1"),
        (4.5e7, 9, "4.5e+07"),
        (1e6, 9, "1e+06"),
        (999999, 9, "999999.0"),
        (16777215, 9, "16777215.0"),
        (1 / 3, 9, "0.333333343"),
        (1e-5, 9, "1e-05"),
        (1e-45, 9, "1.4013e-45"),
        (3.4028235e38, 9, "3.40282347e+38"),
        (1 / 3, 17, "0.33333333333333331"),
        (0.1, 17, "0.1"),
        (2.0, 17, "2.0"),
        (float("nan"), 9, "NaN"),
        (float("-inf"), 9, "-Infinity"),
    ],
)
def test_decimal(value, digits, text):
    assert decimal(np.float32(value) if digits == 9 else value, digits) == text


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (0.1, "0.1"),
        (123456789.5, "123456792.0"),  # a bare number is shown as a float
        ([1e21, 1e20, 123.25, 1e-7, 0.001, -2.5e-10, 5e-324], None),
        (Object(), "{}"),
        ([], "[]"),
        (Object([("a", [1, Object([("b", None)])])]), None),
    ],
)
def test_dump(value, text):
    shown = {
        7: "[1e21, 100000000000000000000.0, 123.25, 1e-7, 0.001, -2.5e-10, 5e-324]",
        1: '{\n    "a": [1, {\n            "b": null\n        }]\n}',
    }
    assert dump(value) == (text or shown[len(value)])


def test_writing_stops_at_a_nan_in_a_quoted_document():
    with pytest.raises(ServingError, match='"x": 1,\n    "y":  Expecting'):
        read('{"instances": 0, "x": 1, "y": NaN}', x="float")


@pytest.mark.parametrize(
    ("body", "text"),
    [
        ("[1, 2]", "JSON Value: [1, 2] Is not object"),
        ("  ", "JSON Parse error: The document is empty. at offset: 2"),
        ('{"a":1,}', "JSON Parse error: Missing a name for object member. at offset: 7"),
        (
            '{"a":[1,2}',
            "JSON Parse error: Missing a comma or ']' after an array element. at offset: 9",
        ),
        ('{"a":1e999}', "JSON Parse error: Number too big to be stored in double. at offset: 5"),
    ],
)
def test_parse_errors(body, text):
    with pytest.raises(ServingError) as error:
        parse(body.encode())
    assert error.value.message == text


@pytest.mark.parametrize(
    ("body", "types", "text"),
    [
        (
            '{"instances":[{"x":1}]}',
            {"x": "float", "label": "int64"},
            "Failed to process element: 0 of 'instances' list. JSON object: {\n    \"x\": 1\n} "
            "keys must be equal to: label,x",
        ),
        (
            '{"inputs":{"x":1}}',
            {"x": "float", "label": "int64"},
            "Missing named input: label in 'inputs' object.",
        ),
        (
            '{"inputs":[1]}',
            {"x": "float", "label": "int64"},
            "inputs is a plain value/list, but expecting an object as multiple input tensors "
            "required as per tensorinfo_map",
        ),
        (
            '{"instances":[]}',
            {"x": "float"},
            "JSON Value: {\n    \"instances\": []\n} No values in 'instances' array",
        ),
        (
            '{"instances":[1],"inputs":[1]}',
            {"x": "float"},
            'JSON Value: {\n    "instances": [1],\n    "inputs": [1]\n} Not formatted correctly '
            "expecting only one of 'inputs' or 'instances' keys to exist ",
        ),
        (
            '{"instances":[16777216]}',
            {"x": "float"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: Cannot "
            "convert JSON value: 16777216 to float without loss of precision.",
        ),
        (
            '{"instances":[1e39]}',
            {"x": "float"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: Cannot "
            "convert JSON value: 1e+39 to float without loss of precision.",
        ),
        (
            '{"instances":[[1,2],[[1],[2]]]}',
            {"x": "float"},
            "Failed to process element: 1 of 'instances' list. Error: INVALID_ARGUMENT: Expecting "
            "shape [2] but got: [2,1]",
        ),
        (
            '{"instances":[[[1,2],[3]]]}',
            {"x": "float"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: "
            "Encountered list at unexpected size: 1 at level: 1 expected size: 2",
        ),
        (
            '{"instances":[{"x":1},2]}',
            {"x": "float"},
            "Expecting object but got list at item 1 of input list",
        ),
        (
            '{"instances":[1,{"x":1}]}',
            {"x": "float"},
            "Expecting value/list but got object at item 1 of input list",
        ),
        (
            '{"instances":[2147483648]}',
            {"x": "int32"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON "
            "Value: 2147483648 Type: Number is not of expected type: int32",
        ),
        (
            '{"instances":[{"b64":"a"}]}',
            {"x": "string"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: Unable to "
            "base64 decode",
        ),
        (
            '{"instances":[null]}',
            {"x": "float"},
            "Failed to process element: 0 of 'instances' list. Error: INVALID_ARGUMENT: JSON "
            "Value: null Type: Null is not of expected type: float",
        ),
    ],
)
def test_a_request_that_does_not_fit(body, types, text):
    with pytest.raises(ServingError) as error:
        read(body, **types)
    assert error.value.message == text


def test_values_and_types():
    request = read(
        '{"instances":[{"f":[1,NaN],"i":300,"b":true,"s":"é"},'
        '{"i":-1,"b":false,"f":[-Infinity,16777215],"s":{"b64":"AP8"}}]}',
        f="float",
        i="uint8",
        b="bool",
        s="string",
    )
    assert request.row
    np.testing.assert_array_equal(
        request.inputs["f"], np.float32([[1, np.nan], [-np.inf, 16777215]])
    )
    np.testing.assert_array_equal(request.inputs["i"], np.uint8([44, 255]))
    np.testing.assert_array_equal(request.inputs["b"], [True, False])
    assert request.inputs["s"].tolist() == ["é".encode(), b"\x00\xff"]
    assert {k: v.dtype.name for k, v in request.inputs.items()} == {
        "f": "float32",
        "i": "uint8",
        "b": "bool",
        "s": "object",
    }


def test_a_number_for_every_pixel_is_read_as_one_by_one():
    """The quick way through regular lists gives what the careful one gives."""
    values = np.random.default_rng(0).uniform(-1, 1, (3, 4, 5, 2))
    values[1, 2, 3, 1] = 7
    body = json.dumps({"instances": values.tolist()}).replace("7.0", "7")
    quick = read(body, x="float").inputs["x"]
    careful = read(body.replace(" 7]", " NaN]"), x="float").inputs["x"]
    np.testing.assert_array_equal(quick, values.astype(np.float32))
    values[1, 2, 3, 1] = np.nan
    np.testing.assert_array_equal(careful, values.astype(np.float32))


def test_a_boolean_among_numbers_is_found():
    with pytest.raises(ServingError, match="JSON Value: true Type: True"):
        read('{"instances":[[1.5,true]]}', x="float")


@pytest.mark.parametrize(
    ("text", "value"),
    [("aGk=", b"hi"), ("aGk", b"hi"), ("aGk.", b"hi"), (" a G\nk= ", b"hi"), ("", b"")],
)
def test_base64(text, value):
    assert decode_base64(Object([("b64", text)])) == value


@pytest.mark.parametrize("text", ["a", "aGk==", "aG=k", "aG_k", "aGk=a", "é"])
def test_no_base64(text):
    with pytest.raises(ServingError, match="Unable to base64 decode"):
        decode_base64(Object([("b64", text)]))


def test_columns_and_rows_of_every_type():
    outputs = {
        "b": np.array([[True], [False]]),
        "n": np.array([[2**63 - 1], [-1]]),
        "d": np.array([[1 / 3], [2.0]]),
        "x_bytes": np.array([[b"\x00"], [b"hi"]], object),
        "s": np.array([[b'a"\n'], ["é".encode()]], object),
        "none": np.zeros((2, 0), np.float32),
    }
    rows = json.loads(write_rows(outputs))["predictions"]
    columns = json.loads(write_columns(outputs))["outputs"]
    assert rows[0] == {
        "b": [True],
        "n": [2**63 - 1],
        "d": [1 / 3],
        "x_bytes": [{"b64": "AA=="}],
        "s": ['a"\n'],
        "none": [],
    }
    assert columns == {name: [rows[0][name], rows[1][name]] for name in outputs}


def test_bytes_that_are_no_text_go_out_as_they_are():
    text = write_columns({"s": np.array([b"\xff\xfe"], object)})
    assert text.encode(errors="surrogateescape").count(b"\xff\xfe") == 1
