"""What a run's rounds take of a device's memory, whatever the number of clients at once.

What one more client at once takes is in `memory`.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.trees import Selection, exclude, select, tree_bytes
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.data.streamed import HostData, capacity_for
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.sizes import Traffic
from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.rounds.federation import Federation
from fedqsn_jax.simulation.from_config import cohort_places
from fedqsn_jax.simulation.scheduling import calls_of


def proxy_and_deltas(
    sent: Params, trained: Params, sites: Sites, algorithm: Algorithm
) -> dict[str, int]:
    """Returns the bytes of the round's proxy and of the sum of deltas, both float32, by purpose.

    Args:
      sent: The tensors that are sent, or their shapes.
      trained: Those that are trained, likewise.
      sites: The mask sites.
      algorithm: Tells whether each client is given a rounding of its own.
    """

    def size(params: Params) -> int:
        return 4 * sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(params))

    other = size(select(sent, algorithm.traced(sites)))
    return {
        "dequantized proxy of the round": size(sent),
        "sum of deltas": size(trained),
        **({"other roundings of the proxy": other} if other else {}),
    }


def fixed_memory(
    federation: Federation, params: Params, sites: Sites, config: Config, data: ClientData
) -> dict[str, int]:
    """Returns what else a device holds during a round, bytes by purpose.

    Args:
      federation: The method.
      params: What its ``init`` takes, or their shapes.
      sites: The mask sites.
      config: The settings.
      data: The population.

    Raises:
      ConfigError: Clients' residuals, or the rows of two calls, take more than there is.
    """
    state = jax.eval_shape(federation.init, jax.random.key(0), params)
    columns = sum(site.layers * site.columns for site in sites.drawing)
    residuals = tree_bytes(state.residuals)
    own = {}
    if residuals:
        own = {"residuals of all clients": residuals}
        own["residuals of the cohort"] = residuals // data.clients * config.cohort.size
    if sum(own.values()) > device_bytes():
        raise ConfigError(
            f"upload.error_feedback = True: residuals of {data.clients} clients take "
            f"{sum(own.values()) / 2**30:.1f} GiB, a device has {device_bytes() / 2**30:.1f} GiB; "
            f"allowed is False, or fewer clients"
        )
    return {
        "server's state with attackers' copies": tree_bytes(state) - residuals,
        **own,
        "client masks": cohort_places(config, data.clients) * columns,
        **_rows_memory(federation, params, config, data),
    }


def _rows_memory(
    federation: Federation, params: Params, config: Config, data: ClientData
) -> dict[str, int]:
    if not isinstance(data, HostData):
        return {"clients' rows": data.device_bytes}

    def keys(key: Array) -> tuple[Array, Array]:
        zeros = jax.tree.map(lambda leaf: jnp.zeros(leaf.shape, leaf.dtype), params)
        state = federation.init(key, zeros)
        return state.secret_key, state.public_key

    key = federation_key(config.seed)
    secret_key, public_key = jax.jit(keys)(key)
    state = dataclasses.replace(
        jax.eval_shape(federation.init, key, params), secret_key=secret_key, public_key=public_key
    )
    cohorts = draw_cohorts(federation, state, config.rounds)
    calls = [cohorts[start:stop] for start, stop in calls_of(0, config)]
    needed, available = 2 * capacity_for(data, calls).device_bytes(data), device_bytes()
    if needed > available:
        raise ConfigError(
            f"rounds_per_call = {config.rounds_per_call}: the clients' rows of two calls take "
            f"{needed / 2**30:.1f} GiB, a device has {available / 2**30:.1f} GiB; allowed is less, "
            f"or a smaller cohort.size"
        )
    return {"clients' rows of two calls": needed}


def own_frozen_bytes(
    params: Params, sites: Sites, trained: Selection, *, traffic: Traffic, algorithm: Algorithm
) -> int:
    """Returns the bytes of the frozen tensors that each client has in its own way.

    Args:
      params: The parameters, or their shapes.
      sites: The mask sites.
      trained: The tensors that are trained.
      traffic: Tells which sites are masked.
      algorithm: Tells whether each client is given a rounding of its own.
    """
    own = sites.masked_by(traffic.down.per_column).tensors | algorithm.traced(sites)
    return tree_bytes(select(exclude(params, trained), own))
