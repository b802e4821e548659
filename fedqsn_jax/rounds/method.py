"""What a federated method is made of."""

from typing import NamedTuple

from fedqsn_jax.core.trees import TensorRoles
from fedqsn_jax.protocol.proxy import ProxyTransform
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.upload import Upload, whole_upload
from fedqsn_jax.rounds.aggregation import Aggregator
from fedqsn_jax.rounds.client import ClientUpdate
from fedqsn_jax.rounds.participation import EVERYONE, Participation


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
    """

    transform: ProxyTransform
    update: ClientUpdate
    aggregator: Aggregator
    sites: Sites
    roles: TensorRoles = TensorRoles()
    upload: Upload = whole_upload()
    participation: Participation = EVERYONE
