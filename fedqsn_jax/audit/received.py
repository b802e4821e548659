"""What colluding clients hold: the payloads that they were sent, and what they make of them."""

import dataclasses
import functools
import json
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.quantization_cells import Cells, first_cells, narrow
from fedqsn_jax.core.trees import leaves_by_path, path_of
from fedqsn_jax.core.types import Array, Columns, Params
from fedqsn_jax.host.atomic_files import replacing
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.masks import spread
from fedqsn_jax.protocol.proxy import Proxy, dequantize_proxy
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.wire import decode_proxy
from fedqsn_jax.rounds.views import Attacker, update_attacker
from fedqsn_jax.simulation.costs import expected_costs, payloads_per_client

_NAME = re.compile(r"round_(\d+)_client_(\d+)\.proxy")
_COMPLETE = "complete.json"
RECENT = 4
"""How many versions of the model, of different rounds, are kept for `low_rank_differences`."""


class Payloads(NamedTuple):
    """The payloads in a directory: one file for each client and round, and a list at the end."""

    directory: Path

    def keep(self, round_index: int, client: int, payload: bytes) -> None:
        """Writes a payload, whole or not at all."""
        name = f"round_{round_index:06}_client_{client:06}.proxy"
        with replacing(self.directory / name) as temporary:
            temporary.write_bytes(payload)

    def complete(self, facts: dict[str, Any]) -> None:
        """Says that everything is there, and of which run and clients."""
        with replacing(self.directory / _COMPLETE) as temporary:
            temporary.write_text(json.dumps(facts, indent=2) + "\n")

    def facts(self) -> dict[str, Any] | None:
        """What `complete` was told; None: not all is there."""
        try:
            return dict(json.loads((self.directory / _COMPLETE).read_text()))
        except (OSError, ValueError, TypeError):
            return None

    def keep_change(self, round_index: int, change: Params) -> None:
        """Writes what a round did to the tensors that travel; only the auditor has it."""
        leaves = {name: np.asarray(leaf) for name, leaf in leaves_by_path(change).items()}
        with replacing(self._change(round_index)) as temporary, temporary.open("wb") as file:
            np.savez(file, **leaves)  # type: ignore[arg-type]

    def read_change(self, round_index: int, like: Params) -> Params:
        """Reads what `keep_change` wrote, in the structure of ``like``."""
        with np.load(self._change(round_index)) as leaves:
            return jax.tree_util.tree_map_with_path(lambda path, _: leaves[path_of(path)], like)

    def _change(self, round_index: int) -> Path:
        return self.directory / f"round_{round_index:06}.change.npz"

    def read(self, layout: Layout, members: Sequence[int]) -> Iterator[tuple[int, int, Proxy]]:
        """The proxies that members were sent: ``(round, client, proxy)``, in order of rounds.

        Raises:
          ValueError: A payload is damaged.
        """
        wanted = set(map(int, members))
        for path in sorted(self.directory.glob("*.proxy")):
            found = _NAME.fullmatch(path.name)
            if found and int(found[2]) in wanted:
                yield int(found[1]), int(found[2]), decode_proxy(path.read_bytes(), layout)


class Holdings(NamedTuple):
    """What a coalition makes of its payloads; values are not scaled.

    Attributes:
      union: The latest copy of every column and tensor, and which columns are known.
      latest: The proxy that was received last, dequantized; None: none was received.
      mean: The mean over all versions of each entry.
      cells: Where each entry of a quantized kernel lies, by the latest versions that agree.
      versions: The last proxies of different rounds, dequantized, the latest last.
      rounds: In which rounds a member took part.
      payloads: How many payloads.
    """

    union: Attacker
    latest: Proxy | None
    mean: Params
    cells: Cells
    versions: tuple[Proxy, ...]
    rounds: tuple[int, ...]
    payloads: int


def hold(
    proxies: Iterator[tuple[int, int, Proxy]], members: Sequence[int], like: Params, sites: Sites
) -> Holdings:
    """Goes through all that was received, once.

    Args:
      proxies: What `Payloads.read` gives.
      members: The coalition.
      like: The tensors that travel, or others of their shapes, with gaps.
      sites: The mask sites.
    """
    known = {
        site.path: jnp.zeros((site.layers, site.columns), bool) for site in sites if site.draws
    }
    nothing = jax.tree.map(jnp.zeros_like, like)
    # Without its members: the program is the same for all coalitions.
    union = Attacker(jnp.zeros(0, jnp.int32), nothing, known)
    total, seen = nothing, jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, jnp.float32), like)
    cells: Cells | None = None
    versions: dict[int, Proxy] = {}
    rounds: list[int] = []
    latest, count = None, 0
    for index, _, proxy in proxies:
        cells = cells if cells is not None else first_cells(proxy)
        values, union, total, seen, cells = _take(union, total, seen, cells, proxy, sites)
        versions.pop(index, None)
        versions[index] = latest = values
        versions = dict(list(versions.items())[-RECENT:])
        rounds.append(index)
        count += 1
    mean = jax.tree.map(lambda s, n: (s / jnp.maximum(n, 1)).astype(s.dtype), total, seen)
    return Holdings(
        dataclasses.replace(union, members=jnp.asarray(members, jnp.int32)),
        latest,
        mean,
        cells or {},
        tuple(versions.values()),
        tuple(dict.fromkeys(rounds)),
        count,
    )


@functools.partial(jax.jit, static_argnames="sites")
def _take(
    union: Attacker, total: Params, seen: Params, cells: Cells, proxy: Proxy, sites: Sites
) -> tuple[Proxy, Attacker, Params, Params, Cells]:
    """One more proxy: its values, and what is held with it."""
    values = dequantize_proxy(proxy)
    union = update_attacker(union, _columns(union, proxy), values, sites)
    return values, union, *_add(total, seen, values, sites), narrow(cells, proxy)


def _columns(union: Attacker, proxy: Proxy) -> Columns:
    everything = {path: jnp.ones_like(known) for path, known in union.known.items()}
    return {"": jnp.bool_(True), **everything, **proxy.visible}


def _add(total: Params, seen: Params, values: Proxy, sites: Sites) -> tuple[Params, Params]:
    now = spread(values.visible, total, sites, True)
    total = jax.tree.map(
        lambda sum_, new, on: jnp.where(on, sum_ + new, sum_), total, values.params, now
    )
    seen = jax.tree.map(lambda count, on: jnp.where(on, count + 1, count), seen, now)
    return total, seen


def known_share(union: Attacker) -> dict[str, Array]:
    """The share of each site's columns that is known, float32 scalars."""
    return {path: known.mean() for path, known in union.known.items()}


def rescaling(union: Attacker) -> dict[str, Array]:
    """One over the known share of each site, as `views.attacker_params` has it."""
    return {
        path: jnp.where(known.any(), known.size / jnp.maximum(known.sum(), 1), 1.0)
        for path, known in union.known.items()
    }


def expected_bytes(case: Case, payloads: int) -> float:
    """Bytes that so many payloads take, by the expected numbers of visible columns."""
    # What is expected of a round counts the clients that have their payload already.
    simulation = case.simulation
    return payloads * expected_costs(simulation).down / payloads_per_client(simulation)


def not_recorded(payloads: Payloads, members: Sequence[int]) -> list[int]:
    """The members of whom nothing was written down."""
    facts = payloads.facts()
    kept = set(facts["clients"]) if facts else set()
    return [int(member) for member in members if int(member) not in kept]
