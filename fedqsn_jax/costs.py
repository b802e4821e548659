"""What a run will cost, before it runs: how tensors travel, bytes a client, memory."""

import math
from typing import Any

import jax

from fedqsn_jax.data.federated import FederatedData
from fedqsn_jax.masking import leaves_by_path
from fedqsn_jax.reporting.summary import Costs, TensorRow
from fedqsn_jax.simulation import Simulation, client_optimizer, initial_state
from fedqsn_jax.types import Params


def tensor_rows(simulation: Simulation, params: Params) -> list[TensorRow]:
    """Says of every tensor whether it is a mask site and how it travels.

    Args:
      simulation: The method.
      params: The parameters, or their shapes.
    """
    kernels = {site.path: site for site in simulation.sites}
    biases = {site.bias_path: site for site in simulation.sites if site.bias_path}
    quantizer = simulation.algorithm.quantizer
    rows = []
    for path, leaf in leaves_by_path(params).items():
        site = kernels.get(path) or biases.get(path)
        travels = f"{leaf.dtype}, whole"
        hidden = None
        if site is not None:
            masked = site.path in simulation.traffic.down.per_column
            hidden = hidden_share(simulation) if masked else None
            columns = "visible columns" if masked else "whole"
            travels = f"{leaf.dtype}, {columns}"
            if quantizer is not None and path in kernels:
                name = type(quantizer).__name__
                travels = f"{quantizer.bits}-bit {name}, block {quantizer.block_size}, {columns}"
        kernel = kernels.get(path)
        rows.append(
            TensorRow(
                path,
                tuple(leaf.shape),
                str(leaf.dtype),
                travels,
                columns=None if kernel is None else kernel.layers * kernel.columns,
                fan_in=None if kernel is None else kernel.fan_in,
                hidden=hidden,
            )
        )
    return rows


def hidden_share(simulation: Simulation) -> float:
    """Expected share of a site's columns that one client does not see in one round."""
    algorithm = simulation.algorithm
    return 1 - (1 - algorithm.p1) * (1 - algorithm.p2)


def expected_costs(simulation: Simulation, params: Params, data: FederatedData) -> Costs:
    """Expected bytes down and up a client a round, and an estimate of memory.

    Args:
      simulation: The method.
      params: The parameters, or their shapes.
      data: The clients' rows.
    """
    traffic, share = simulation.traffic, 1 - hidden_share(simulation)
    by_path = {site.path: site for site in simulation.sites}
    visible = {
        path: share * by_path[path].layers * by_path[path].columns
        for path in traffic.down.per_column
    }
    memory = estimate_memory(simulation, params, data)
    return Costs(
        down=traffic.down.of(visible),
        up=traffic.up.of(visible),
        fedavg_down=traffic.fedavg_down,
        fedavg_up=traffic.fedavg_up,
        memory=(*memory.items(), ("in all", sum(memory.values()))),
    )


def estimate_memory(simulation: Simulation, params: Params, data: FederatedData) -> dict[str, int]:
    """Estimates what lies on the device during a round, without activations; bytes by name.

    Args:
      simulation: The method.
      params: The parameters, or their shapes.
      data: The clients' rows.
    """
    config = simulation.config
    model = _bytes(params)
    optimizer = client_optimizer(config.client)
    local = _bytes(jax.eval_shape(optimizer.init, params))
    at_once = max(simulation.client_axis.chunk_size, 1)
    state = jax.eval_shape(lambda params: initial_state(simulation, params), params)
    return {
        "server's state with attackers' copies": _bytes(state),
        "dequantized proxy of the round": model,
        "sum of deltas": model,
        # Effective parameters at the start and now, and a gradient.
        f"training of {at_once} client(s) at once": at_once * (3 * model + local),
        "clients' rows": _bytes(data),
    }


def _bytes(tree: Any) -> int:
    total = 0
    for leaf in jax.tree.leaves(tree):
        is_key = jax.dtypes.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        total += math.prod(leaf.shape) * (8 if is_key else leaf.dtype.itemsize)
    return total
