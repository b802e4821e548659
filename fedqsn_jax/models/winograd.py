"""Winograd's minimal filtering of 2x2 outputs by 3x3 windows, F(2x2, 3x3) (arXiv 1509.09308).

A 3x3 convolution of 2x2 outputs, ``A^T ((G g G^T) * (B^T d B)) A``, takes 16 products of channels
in place of 36. Each function below is one of the factors, in one dimension: it maps a sequence of
arrays to another by additions and halvings, so it applies to whatever shape they have. `both`
applies one along rows and columns.
"""

from collections.abc import Callable, Sequence
from typing import Any

Arrays = Sequence[Any]
INPUTS = ((0, 2, -1), (1, 2, 1), (2, 1, -1), (1, 3, -1))
"""``B^T``: of four inputs the first, plus or minus (the third number) the second."""


def of_inputs(inputs: Arrays) -> list[Any]:
    """``B^T d``: four of four inputs."""
    return [
        inputs[first] + inputs[second] if sign > 0 else inputs[first] - inputs[second]
        for first, second, sign in INPUTS
    ]


def of_kernel(taps: Arrays) -> list[Any]:
    """``G g``: four of three taps."""
    first, middle, last = taps
    ends, half = (first + last) / 2, middle / 2
    return [first, ends + half, ends - half, last]


def to_outputs(products: Arrays) -> list[Any]:
    """``A^T m``: two outputs of four products."""
    first, plus, minus, last = products
    return [first + plus + minus, plus - minus - last]


def of_cotangents(outputs: Arrays) -> list[Any]:
    """``A y``, the transpose of `to_outputs`: four of two cotangents of outputs."""
    first, second = outputs
    return [first, first + second, first - second, -second]


def to_kernel(products: Arrays) -> list[Any]:
    """``G^T m``, the transpose of `of_kernel`: three taps' cotangents of four."""
    first, plus, minus, last = products
    half = (plus + minus) / 2
    return [first + half, (plus - minus) / 2, half + last]


def both(transform: Callable[[Arrays], list[Any]], grid: Sequence[Arrays]) -> list[list[Any]]:
    """Applies a transform along both dimensions of ``grid[row][column]``."""
    down = [transform(column) for column in zip(*grid, strict=True)]
    return [transform(row) for row in zip(*down, strict=True)]
