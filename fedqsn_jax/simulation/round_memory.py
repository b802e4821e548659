"""What a run's rounds take of a device's memory, whatever the number of clients at once.

What one more client at once takes is in `memory`.
"""

import dataclasses
import math
from typing import NamedTuple

import jax
import jax.numpy as jnp

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.core.trees import Selection, exclude, leaves_by_path, select, tree_bytes
from fedqsn_jax.core.types import Array, Params
from fedqsn_jax.data.population import ClientData
from fedqsn_jax.data.streamed import HostData, capacity_for
from fedqsn_jax.host.devices import device_bytes
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.proxy import quantize_sites
from fedqsn_jax.protocol.quantization import Quantizer
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.sizes import Traffic
from fedqsn_jax.protocol.stored_kernels import select_stored, stored_kernels
from fedqsn_jax.rounds.calls import draw_cohorts
from fedqsn_jax.rounds.federation import Federation
from fedqsn_jax.simulation.from_config import cohort_places
from fedqsn_jax.simulation.scheduling import calls_of


def proxy_and_deltas(
    sent: Params, trained: Params, sites: Sites, algorithm: Algorithm
) -> dict[str, int]:
    """Returns the bytes of the round's proxy and of the sum of deltas, both float32, by purpose.

    Args:
      sent: The tensors that are sent, or their shapes, without those that stay codes.
      trained: Those that are trained, likewise.
      sites: The mask sites.
      algorithm: Tells whether each client is given a rounding of its own.
    """

    changed = frozenset(leaves_by_path(trained))
    # What is frozen and of no site is the server's own tensor.
    sent = exclude(sent, frozenset(leaves_by_path(exclude(sent, sites.tensors | changed))))

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


class StoredBytes(NamedTuple):
    """What kernels take that stay codes.

    Attributes:
      computed_with: The shapes of what the model computes with.
      codes: Bytes of the codes and scales of all of them.
      one_layer: Bytes of the values of the largest one's layer, float32 and in the dtype of a
        product, while it is computed with.
    """

    computed_with: Params
    codes: int
    one_layer: int

    @classmethod
    def of(
        cls, params: Params, stored: frozenset[str], sites: Sites, quantizer: Quantizer | None
    ) -> "StoredBytes":
        """Counts them.

        Args:
          params: The parameters, or their shapes.
          stored: The paths of the kernels.
          sites: The mask sites.
          quantizer: What makes codes of them; None: there are none.
        """
        some = Sites(site for site in sites if site.path in stored)
        if not some or quantizer is None:
            return cls(params, 0, 0)
        factors = {one.path: jnp.ones((one.layers, one.columns), jnp.float32) for one in some}

        def store(params: Params) -> tuple[Params, Params]:
            quantized = quantize_sites(params, quantizer, some)
            return stored_kernels(quantized, factors, some), select_stored(quantized)

        computed_with, codes = jax.eval_shape(store, params)
        largest = max(site.fan_in * site.columns for site in some)
        return cls(computed_with, tree_bytes(codes), 8 * largest)
