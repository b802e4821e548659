"""What a federated method is made of."""

from typing import Any, Literal, NamedTuple

from fedqsn_jax.core.keys import client_round_key, leak_tracing_key, sticky_client_key
from fedqsn_jax.core.trees import TensorRoles
from fedqsn_jax.core.types import Array, Key
from fedqsn_jax.protocol.broadcast import EVERY_ROUND, Broadcast
from fedqsn_jax.protocol.proxy import Proxy, ProxyTransform, round_by_key
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.upload import Upload, whole_upload
from fedqsn_jax.rounds.aggregation import Aggregator
from fedqsn_jax.rounds.client import ClientUpdate
from fedqsn_jax.rounds.participation import EVERYONE, Participation
from fedqsn_jax.rounds.privacy import Privacy

MaskPer = Literal["round", "client"]


class Method(NamedTuple):
    """The parts of a federated method; static.

    Attributes:
      transform: Makes proxies.
      update: Trains them.
      aggregator: Folds deltas into the hidden model.
      sites: The mask sites.
      roles: Which tensors go where. Those that are not sent are frozen, and public unless they are
        withheld; no view but the global one has withheld ones.
      upload: The way back.
      participation: How clients fail.
      broadcast: What of the hidden model proxies are made of.
      mask_per: ``round``: a client draws another mask in each round; ``client``: it keeps its mask
        for good.
      privacy: How clients are protected from what is made of their updates; None: they are not.
        The aggregator clips by the same norm, and has uniform weights.
      stored: The paths of frozen kernels that all compute with as codes; see `stored_kernels`.
    """

    transform: ProxyTransform
    update: ClientUpdate
    aggregator: Aggregator
    sites: Sites
    roles: TensorRoles = TensorRoles()
    upload: Upload = whole_upload()
    participation: Participation = EVERYONE
    broadcast: Broadcast = EVERY_ROUND
    mask_per: MaskPer = "round"
    privacy: Privacy | None = None
    stored: frozenset[str] = frozenset()

    def mask_key(self, secret_key: Key, round_index: Array | int, client_id: Array | int) -> Key:
        """Returns the key of a client's mask in a round."""
        if self.mask_per == "client":
            return sticky_client_key(secret_key, client_id)
        return client_round_key(secret_key, round_index, client_id)

    def proxy_of(
        self,
        client_id: Array | int,
        prepared: Proxy,
        *,
        secret_key: Key,
        round_index: Array | int,
        transform_state: Any,
    ) -> Proxy:
        """Returns what a client is sent in a round: with its masks, in its own rounding."""
        key = self.mask_key(secret_key, round_index, client_id)
        proxy = self.transform.apply(key, transform_state, prepared)
        return round_by_key(proxy, leak_tracing_key(secret_key, client_id))
