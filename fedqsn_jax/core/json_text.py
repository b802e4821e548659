"""Reading JSON that somebody else has written: whatever is wrong with it is a ValueError."""

import json
import sys
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Returns the value that a JSON text stands for.

    Raises:
      ValueError: It is no JSON, or so deep, or with numbers so long, that Python does not read it;
        or it names a key twice, of which only one would be read.
    """
    try:
        return json.loads(text, object_pairs_hook=_object)
    except _TwiceError as error:
        raise ValueError(str(error)) from None
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error
    except ValueError as error:
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"a number of more than {digits} digits") from error


class _TwiceError(ValueError):
    """A key that stands in an object twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise _TwiceError(f"JSON that has the key {twice!r} twice in an object")
    return values
