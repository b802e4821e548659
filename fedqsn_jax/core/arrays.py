"""What arrays may be that a user brings: rows, parameters, labels, ids.

This is the one place that says so. Allowed are booleans, integers and floating-point numbers that
a device can hold, of either byte order, without a mask that hides anything. Complex and extended
numbers, text, dates, records, random keys and Python objects are refused, and so are 64-bit values
that the device would silently change. Labels are whole numbers, however they are written. Ids are
int64 where all of them are integers that fit, and text otherwise.

A mistake is a `ValueError` of one line that begins with ``where``: whose array it is.
"""

import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import numpy as np

NUMBERS = (
    *("bool", "int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
    *("float16", "bfloat16", "float32", "float64"),
)
"""The dtypes of arrays of numbers."""

ALLOWED = "booleans, integers and floating-point numbers of up to 64 bits"

_INT64 = np.iinfo(np.int64)
_ENTRIES_AT_A_TIME = 2**20


def read_array(value: Any, where: str, *, scalar: bool = False) -> np.ndarray:
    """Returns rows or parameters on the host, in the machine's byte order.

    Values are not looked at (`check_values` does that), and nothing is copied that need not be:
    files that are mapped into memory stay there, unless their byte order is another.

    Args:
      value: An array of NumPy's or JAX's, or numbers in lists.
      where: Whose it is; messages begin with it.
      scalar: Whether a single number is allowed.

    Raises:
      ValueError: It is none of the arrays that are allowed.
    """
    if _is_masked(value):
        raise ValueError(
            f"{where} is a masked array in which values are masked; allowed are arrays without, "
            f"such as array.filled(VALUE)"
        )
    try:
        array = np.asarray(value)
    except Exception as error:  # Whatever a foreign object's conversion raises.
        message = " ".join(str(error).split())
        raise ValueError(f"{where} cannot be made an array: {message}") from error
    if array.dtype.name not in NUMBERS:
        raise ValueError(f"{where} is of dtype {array.dtype}; allowed are {ALLOWED}")
    if array.ndim == 0 and not scalar:
        raise ValueError(f"{where} is a scalar; allowed is an array [rows, ...]")
    if isinstance(value, list | tuple) and array.dtype.itemsize == 8:
        # NumPy makes floats of integers that are too large, and their last digits are lost.
        for each in np.asarray(value, object).ravel():
            if isinstance(each, int) and not _fits(each):
                raise ValueError(f"{where} has the value {each}; allowed are integers of 64 bits")
    return array.astype(array.dtype.newbyteorder("="), copy=False)


def check_values(array: np.ndarray, where: str) -> None:
    """Makes sure that a device can hold the values: there, 64 bits become 32 (but under x64).

    Args:
      array: From `read_array`.
      where: Whose it is; messages begin with it.

    Raises:
      ValueError: An integer would become another, or a finite number infinite.
    """
    narrow = jax.dtypes.canonicalize_dtype(array.dtype)
    if narrow == array.dtype:
        return
    for piece in _pieces(array):
        with np.errstate(over="ignore"):
            converted = piece.astype(narrow)
        if np.issubdtype(narrow, np.integer):
            changed = piece != converted
        else:
            changed = np.isfinite(piece) & ~np.isfinite(converted)
        if changed.any():
            raise ValueError(
                f"{where} has the value {piece[changed][0]}, which {narrow} cannot hold; allowed "
                f"are numbers of 32 bits, or 64 with JAX_ENABLE_X64=1"
            )


def count_not_finite(array: np.ndarray) -> int:
    """Returns how many values are NaN or infinite.

    They are allowed, as a model may know them; but they are told, since most end a training.
    """
    if array.dtype.name not in NUMBERS[-4:]:
        return 0
    return sum(int((~np.isfinite(piece)).sum()) for piece in _pieces(array))


def read_labels(value: Any, where: str) -> np.ndarray:
    """Returns the labels of a classification: int32, or int64 where some are beyond (no classes).

    Booleans are 0 and 1, and floating-point numbers are allowed where they are whole.

    Args:
      value: An array of NumPy's or JAX's, or numbers in lists, of any shape.
      where: Whose they are; messages begin with it.

    Raises:
      ValueError: They are no whole numbers of 64 bits.
    """
    array = read_array(value, where, scalar=True)
    if array.dtype.name in NUMBERS[-4:]:
        with np.errstate(invalid="ignore"):
            wrong = array[~((array == np.floor(array)) & (abs(array) < 2.0**53))]
        if wrong.size:
            raise ValueError(f"{where} has the value {wrong[0]}; allowed are whole numbers, from 0")
    elif array.dtype == np.uint64 and array.size and array.max() > _INT64.max:
        raise ValueError(f"{where} has the value {array.max()}; allowed are whole numbers, from 0")
    wide = array.astype(np.int64)
    narrow = wide.astype(np.int32)
    return narrow if (narrow == wide).all() else wide


def plain_id(value: Any) -> int | str | None:
    """Returns one id as Python's integer or text; None where there is none.

    No id are None, NaN and text without a character that is seen. A floating-point number that is
    whole is the integer: tables write integers so once a value is missing in their column. From
    2**53 on one such number stands for several integers, and is refused.

    Raises:
      ValueError: It is something else; the message says what, and what is allowed.
    """
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, bytes):
        value = value.decode("utf-8", "backslashreplace")
    if value is None or (isinstance(value, float) and math.isnan(value)):
        return None
    if isinstance(value, float) and value.is_integer():
        if abs(value) >= 2**53:
            raise ValueError(
                f"{value!r} is no id, since it stands for several integers; allowed are whole "
                f"numbers and text"
            )
        return int(value)
    if isinstance(value, str):
        if "\0" in value or any("\ud800" <= character <= "\udfff" for character in value):
            raise ValueError(f"{value!r} is no id; allowed is text without NUL or lone surrogates")
        return value if value.strip() else None
    if isinstance(value, bool) or (isinstance(value, float) and math.isfinite(value)):
        return str(value)
    if isinstance(value, int):
        return int(value)
    kind = str(value) if isinstance(value, float) else f"a {type(value).__name__}"
    raise ValueError(f"{kind} is no id; allowed are whole numbers and text")


def ids_array(ids: Sequence[int | str]) -> np.ndarray:
    """Returns ids as an array: int64 if all are integers that fit, otherwise text.

    Text is compared letter by letter, and the integer 1 is the text "1".
    """
    if all(isinstance(each, int) and _fits(each) for each in ids):
        return np.asarray(ids, np.int64)
    return np.asarray([str(each) for each in ids])


def _fits(value: int) -> bool:
    return _INT64.min <= value <= _INT64.max


def _is_masked(value: Any) -> bool:
    if isinstance(value, np.ma.MaskedArray):
        return bool(np.ma.is_masked(value))
    if isinstance(value, list | tuple):
        nested = list | tuple | np.ma.MaskedArray
        return any(_is_masked(each) for each in value if isinstance(each, nested))
    return False


def _pieces(array: np.ndarray) -> Iterator[np.ndarray]:
    """Cuts an array along its rows, so that no copy of all of it is made."""
    if array.ndim == 0:
        yield array[None]
        return
    step = max(1, _ENTRIES_AT_A_TIME // max(1, math.prod(array.shape[1:])))
    for start in range(0, len(array), step):
        yield array[start : start + step]
