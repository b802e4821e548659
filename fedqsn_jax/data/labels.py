"""Labels that are no class: they are found before anything trains on them, silently and in vain."""

import numpy as np


def wrong_labels(labels: np.ndarray, classes: int) -> np.ndarray:
    """Returns the places, ascending, of labels other than 0 to ``classes - 1``.

    Args:
      labels: Integers ``[rows]``.
      classes: Number of classes.
    """
    return np.flatnonzero((labels < 0) | (labels >= classes))


def check_labels(labels: np.ndarray, classes: int, where: str, name: str = "label") -> None:
    """Makes sure that every label is a class.

    Args:
      labels: Integers ``[rows]``.
      classes: Number of classes.
      where: Whose rows they are; the message begins with it.
      name: The name of the labels in a batch.

    Raises:
      ValueError: Some are not: how many, the first of them, and what is allowed, in one line.
    """
    wrong = wrong_labels(labels, classes)
    if wrong.size:
        raise ValueError(
            f"{where}: {wrong.size} of {len(labels)} rows have a label that is no class, such as "
            f"{name!r} = {labels[wrong[0]]}; allowed are 0 to {classes - 1}"
        )
