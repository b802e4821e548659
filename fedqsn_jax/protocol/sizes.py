"""Bytes between server and clients: the real length of payloads, from counts of visible columns.

A payload's length is linear in the visible columns of each site. So a round that counts visible
columns on the device, as integers, tells the exact bytes of all its payloads.
"""

from typing import NamedTuple

import jax

from fedqsn_jax.core.trees import Selection, select
from fedqsn_jax.core.types import Params
from fedqsn_jax.protocol.layout import Cost, Layout, proxy_cost, update_cost
from fedqsn_jax.protocol.proxy import Proxy, ProxyTransform, whole_proxy
from fedqsn_jax.protocol.quantization import Quantizer
from fedqsn_jax.protocol.sites import Sites


class Traffic(NamedTuple):
    """The lengths of one algorithm's payloads, beside FedAvg's.

    Attributes:
      down: A client's download in a round.
      up: A client's upload in a round.
      fedavg_down: Bytes of a download in a round of FedAvg, the whole model as it is.
      fedavg_up: Bytes of an upload in a round of FedAvg.
    """

    down: Cost
    up: Cost
    fedavg_down: int
    fedavg_up: int


def measure_traffic(
    transform: ProxyTransform,
    params: Params,
    sites: Sites,
    *,
    sent: Selection = None,
    trained: Selection = None,
    plain: Params | None = None,
    upload: Quantizer | None = None,
) -> Traffic:
    """Derives a run's `Traffic` from shapes alone.

    Args:
      transform: Makes proxies.
      params: The parameters, or their shapes.
      sites: The mask sites.
      sent: The tensors that travel down.
      trained: Those of them whose updates travel up.
      plain: The parameters that FedAvg would send, or their shapes; by default ``params``.
      upload: How kernels of sites travel up; None: as float32.
    """

    def make_proxy(key: jax.Array, params: Params) -> Proxy:
        whole = whole_proxy(select(params, sent), sites)
        state = transform.init(key, whole)
        return transform.apply(key, state, transform.prepare(state, whole))

    proxy = jax.eval_shape(make_proxy, jax.random.key(0), params)
    plain = params if plain is None else plain
    whole = Layout.of(jax.eval_shape(lambda params: whole_proxy(params, Sites()), plain))
    layout = Layout.of(proxy, trained=trained, upload=upload)
    return Traffic(
        down=proxy_cost(layout),
        up=update_cost(layout),
        fedavg_down=proxy_cost(whole).fixed,
        fedavg_up=update_cost(whole).fixed,
    )
