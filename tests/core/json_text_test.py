"""JSON of others: one kind of error, in a line that says what is wrong."""

import json

import pytest

from fedqsn_jax.core.json_text import parse_json


def test_what_is_json_is_read():
    value = {"a": [1, 2.5, None, True], "ü": "\u2028"}
    assert parse_json(json.dumps(value)) == value
    assert parse_json(json.dumps(value).encode()) == value


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("[" * 10**5, "JSON that is nested too deeply"),
        ('{"a":' * 10**5, "JSON that is nested too deeply"),
        ("[" + "9" * 5000 + "]", "a number of more than 4300 digits"),
        ('{"a": }', "not JSON (Expecting value"),
        (b"\xff", "not JSON ("),
        ("", "not JSON ("),
        ('[{"a": {"b": 1, "c": 2, "b": 1}}]', "JSON that has the key 'b' twice in an object"),
    ],
)
def test_what_is_none_is_a_value_error(text, says):
    with pytest.raises(ValueError, match=r".") as error:
        parse_json(text)
    assert str(error.value).startswith(says)
    assert "\n" not in str(error.value)
