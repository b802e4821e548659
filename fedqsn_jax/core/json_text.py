"""Reading JSON that somebody else has written: whatever is wrong with it is a ValueError."""

import json
import sys
from typing import Any


def parse_json(text: str | bytes) -> Any:
    """Returns the value that a JSON text stands for.

    Raises:
      ValueError: It is no JSON, or so deep, or with numbers so long, that Python does not read it.
    """
    try:
        return json.loads(text)
    except RecursionError as error:
        raise ValueError("JSON that is nested too deeply") from error
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise ValueError(f"not JSON ({error})") from error
    except ValueError as error:
        digits = sys.get_int_max_str_digits()
        raise ValueError(f"a number of more than {digits} digits") from error
