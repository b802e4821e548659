"""Attacks: the latest proxy as it is, the union of everything received, and what may be trained.

Clients that keep what they receive know, after m proxies, of each column that the server does not
hide with probability ``1 - p2**m`` (DESIGN of FedQSN, arXiv 2508.18911, which leaves that out). The
union takes the latest copy of each column, and divides each site by the share that is known.
Fine-tuning it on own rows is the attack of Zhou et al. (TEESlice: Protecting Sensitive Neural
Network Models in Trusted Execution Environments, 2024); with norms and biases only it is an
elicitation (Greenblatt et al., Stress-Testing Capability Elicitation With Password-Locked Models,
2024): it finds what is there and learns little.
"""

from typing import Any

import jax
import jax.numpy as jnp

from fedqsn_jax.audit.case import Case
from fedqsn_jax.audit.received import Holdings, rescaling
from fedqsn_jax.core.trees import matches_any, path_of
from fedqsn_jax.core.types import Params

_SMALL = ("*/bias", "*/*bias", "*/*norm*/*", "bias", "*/*_norm*/*", "*/scale")


def latest_model(case: Case, holdings: Holdings) -> Params:
    """The proxy that was received last, as its client had it.

    Raises:
      ValueError: None was received.
    """
    if holdings.latest is None:
        raise ValueError("no proxy was received")
    return case.model(holdings.latest.params, holdings.latest.scale)


def union_model(case: Case, holdings: Holdings, values: Params | None = None) -> Params:
    """The union of everything received, rescaled.

    Args:
      case: The run.
      holdings: What the coalition holds.
      values: Other values of the same columns; by default the latest copies.
    """
    values = holdings.union.copy if values is None else values
    return case.model(values, rescaling(holdings.union))


def small_tensors(params: Params) -> Params:
    """A tree that lets norms and biases change."""

    def visit(path: Any, leaf: Any) -> Any:
        return jnp.full(leaf.shape, matches_any(path_of(path), _SMALL))

    return jax.tree_util.tree_map_with_path(visit, params)
