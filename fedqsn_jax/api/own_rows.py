"""Rows that a user brings: read, and checked before anything is compiled for them.

A mistake is a `ValueError` of one line: whose rows, what is wrong, what is allowed.
"""

import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import jax
import numpy as np

from fedqsn_jax.core.arrays import check_values, count_not_finite, read_array
from fedqsn_jax.data.labels import check_labels, wrong_labels
from fedqsn_jax.data.population import join_clients
from fedqsn_jax.data.streamed import HostData

Arrays = Mapping[str, Any]
"""Named arrays ``[rows, ...]``, NumPy's or JAX's."""

Rows = dict[str, np.ndarray]
"""The same on the host."""

_FORMAT = "a dictionary of arrays [rows, ...], such as {'image': x, 'label': y}"


def read_clients(clients: Iterable[Arrays] | HostData) -> HostData:
    """Returns the rows of all clients, joined.

    Args:
      clients: Each client's named arrays, or all of them joined already.

    Raises:
      ValueError: They have not this format, or differ in their names, dtypes or shapes of a row,
        or there is no row at all.
    """
    if isinstance(clients, HostData):
        _check_joined(clients)
        data = clients
    else:
        if isinstance(clients, Mapping) or not isinstance(clients, Iterable):
            raise ValueError(
                f"clients: of type {type(clients).__name__}; allowed is a list that has, for each "
                f"client, {_FORMAT}"
            )
        rows = [read_rows(each, f"client {index}") for index, each in enumerate(clients)]
        data = HostData(*join_clients(rows))
    if data.offsets[-1] == data.offsets[0]:
        raise ValueError(f"clients: none of the {data.clients} has a row; allowed is one or more")
    return data


def read_rows(rows: Arrays, where: str) -> Rows:
    """Returns named arrays on the host.

    Args:
      rows: The arrays.
      where: Whose they are; messages begin with it.

    Raises:
      ValueError: They are no dictionary of arrays of numbers that have the same number of rows.
    """
    if not isinstance(rows, Mapping):
        raise ValueError(f"{where}: of type {type(rows).__name__}; allowed is {_FORMAT}")
    if not rows:
        raise ValueError(f"{where}: an empty dictionary; allowed is {_FORMAT}")
    for name in rows:
        if not isinstance(name, str):
            raise ValueError(f"{where}: an array is called {name!r}; allowed is {_FORMAT}")
    read = {name: read_array(array, f"{where}: {name!r}") for name, array in rows.items()}
    lengths = {name: len(array) for name, array in read.items()}
    if len(set(lengths.values())) > 1:
        raise ValueError(f"{where}: its arrays differ in their number of rows: {_listed(lengths)}")
    return read


def _check_joined(data: HostData) -> None:
    """Makes sure of what a round takes for granted about joined rows."""
    if not isinstance(data.examples, Mapping) or not data.examples:
        raise ValueError(f"clients: HostData.examples; allowed is {_FORMAT}")
    offsets = np.asarray(data.offsets)
    if offsets.ndim != 1 or len(offsets) < 2 or not np.issubdtype(offsets.dtype, np.integer):
        raise ValueError(
            f"clients: HostData.offsets is {offsets.dtype}{list(offsets.shape)}; allowed are "
            f"integers [clients + 1], of one client or more"
        )
    rows = min(map(len, data.examples.values()))
    if offsets[0] < 0 or offsets[-1] > rows or (np.diff(offsets) < 0).any():
        raise ValueError(
            f"clients: HostData.offsets go from {offsets[0]} to {offsets[-1]}; allowed are "
            f"ascending numbers from 0 to the {rows} rows of the shortest array"
        )


def check_same(rows: Rows, clients: HostData, where: str) -> None:
    """Makes sure that rows are like the clients', and that there are some.

    Dtypes are compared as JAX has them on the device (float64 there is float32).

    Args:
      rows: The rows.
      clients: Those of the clients.
      where: Whose the rows are; messages begin with it.

    Raises:
      ValueError: They are not.
    """
    ours, theirs = (
        {
            name: f"{jax.dtypes.canonicalize_dtype(array.dtype)}{list(array.shape[1:])}"
            for name, array in sorted(arrays.items())
        }
        for arrays in (rows, clients.examples)
    )
    if list(ours) != list(theirs):
        raise ValueError(
            f"{where} has arrays {', '.join(ours)}; allowed are the clients': {', '.join(theirs)}"
        )
    for name, kind in ours.items():
        if kind != theirs[name]:
            raise ValueError(
                f"{where}: {name!r} is {kind} a row; allowed is {theirs[name]}, as the clients have"
            )
    if not len(next(iter(rows.values()))):
        raise ValueError(f"{where} has no rows; allowed is one or more")


def check_held(clients: HostData, others: Mapping[str, Rows]) -> None:
    """Makes sure that a device can hold all values; see `arrays.check_values`.

    Values of others that are not finite are told in a `UserWarning`. Of the clients' it is told at
    the end whose updates were not.

    Args:
      clients: The clients' rows.
      others: Others' rows, by whose they are.

    Raises:
      ValueError: It would change some.
    """
    for where, arrays in {"clients": clients.examples, **others}.items():
        for name, array in arrays.items():
            check_values(array, f"{where}: {name!r}")
            count = 0 if where == "clients" else count_not_finite(array)
            if count:
                warnings.warn(
                    f"{where}: {name!r} has {count} values that are not finite", stacklevel=4
                )


def check_classes(
    label: str, outputs: jax.ShapeDtypeStruct, clients: HostData, others: Mapping[str, Rows]
) -> None:
    """Makes sure that all rows have labels for which the model has outputs.

    Args:
      label: The name of the labels, which the rows have.
      outputs: What the model makes of a batch: logits ``[rows, classes]``.
      clients: The clients' rows.
      others: Others' rows, like the clients', by whose they are.

    Raises:
      ValueError: The model has other outputs, the labels are no integers ``[rows]``, or some are
        out of range.
    """
    if len(outputs.shape) != 2:
        raise ValueError(
            f"model: its outputs have the shape {list(outputs.shape)}; allowed are logits "
            f"[rows, classes], for classification"
        )
    labels, classes = clients.examples[label], outputs.shape[1]
    if not np.issubdtype(labels.dtype, np.integer) or labels.ndim != 1:
        raise ValueError(
            f"clients: {label!r} is {labels.dtype}{list(labels.shape[1:])} a row; allowed is an "
            f"integer, 0 to {classes - 1}"
        )
    first, last = int(clients.offsets[0]), int(clients.offsets[-1])
    wrong = wrong_labels(labels[first:last], classes)
    if wrong.size:
        # From the right, so that clients without rows are passed over.
        client = int(np.searchsorted(clients.offsets, first + wrong[0], side="right")) - 1
        own = slice(int(clients.offsets[client]), int(clients.offsets[client + 1]))
        check_labels(labels[own], classes, f"client {client}", label)
    for where, rows in others.items():
        check_labels(rows[label], classes, where, label)


def _listed(lengths: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {length}" for name, length in lengths.items())
