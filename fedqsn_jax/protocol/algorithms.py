"""Algorithms: small compositions of what the layers below offer."""

import dataclasses
import enum

from fedqsn_jax.protocol.masks import Sampling
from fedqsn_jax.protocol.proxy import ProxyTransform, chain, client_mask, quantize, server_mask
from fedqsn_jax.protocol.quantization import Quantizer
from fedqsn_jax.protocol.sites import Sites


class Promise(enum.Enum):
    """What this package promises of columns that the server hides; see the invariants 2 and 3."""

    HIDDEN_VALUES_NEVER_CHANGE = "hidden values never change"
    NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES = "nothing that is sent depends on hidden values"


@dataclasses.dataclass(frozen=True)
class Algorithm:
    """What an algorithm does to the model on its way to the clients, and what it promises.

    Attributes:
      name: The name that configurations use.
      quantizer: How kernels of sites travel; None: as they are.
      p1: Probability of a column that is hidden for good.
      p2: Probability of a column that is hidden from one client in one round.
      sampling: How masks are drawn.
      tracing_margin: How near to a border entries are rounded by a secret of each client's.
      adapters_only: Whether the model's own tensors are public, and adapters, quantized in flat
        blocks, are all that is secret, travels and is trained.
      prompts_only: Whether the model never leaves the server at all: clients train prompts on an
        auxiliary model, and the prompts are what they return.
      broken_promises: The promises that it does not keep. A run warns of them.
    """

    name: str
    quantizer: Quantizer | None = None
    p1: float = 0.0
    p2: float = 0.0
    sampling: Sampling = "bernoulli"
    tracing_margin: float = 0.0
    adapters_only: bool = False
    prompts_only: bool = False
    broken_promises: frozenset[Promise] = frozenset()

    @property
    def transform(self) -> ProxyTransform:
        """The chain that makes clients' proxies."""
        stages = [server_mask(self.p1, self.sampling), client_mask(self.p2, self.sampling)]
        if self.quantizer is not None:
            stages.insert(0, quantize(self.quantizer, self.tracing_margin))
        return chain(*stages)

    def traced(self, sites: Sites) -> frozenset[str]:
        """The kernels that each client is sent in a rounding of its own; see `proxy.quantize`."""
        if self.quantizer is None or not self.tracing_margin:
            return frozenset()
        return frozenset(sites.quantized.by_kernel)


def fedavg() -> Algorithm:
    """Federated averaging (arXiv 1602.05629): every client receives the whole model."""
    return Algorithm("fedavg")


def fedsn(p1: float, p2: float, sampling: Sampling = "bernoulli") -> Algorithm:
    """FedQSN's masks without its quantizer."""
    return Algorithm("fedsn", p1=p1, p2=p2, sampling=sampling)


def fedq(quantizer: Quantizer) -> Algorithm:
    """FedQSN's quantizer without its masks."""
    return Algorithm("fedq", quantizer)


def fedqsn(
    quantizer: Quantizer, p1: float, p2: float, sampling: Sampling = "bernoulli"
) -> Algorithm:
    """FedQSN (arXiv 2508.18911): server mask, client masks and quantizer."""
    # Where blocks mix columns, the scales of visible ones tell of hidden ones.
    leaks = quantizer.mixes_columns and _is_positive(p1)
    broken = {Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES} if leaks else set()
    return Algorithm(
        "fedqsn", quantizer, p1=p1, p2=p2, sampling=sampling, broken_promises=frozenset(broken)
    )


def _is_positive(probability: float) -> bool:
    # One that is no number is traced, and may be anything.
    return not isinstance(probability, float | int) or probability > 0


def fedlpp(quantizer: Quantizer) -> Algorithm:
    """FedLPP (arXiv 2406.10976): a public backbone, and quantized copies of private adapters.

    The server's step is the aggregator's, ``W + r (mean of returned - Q(W))``; the other update
    rules that its authors' code has are the aggregator's too: 2 is ``from_sent``, 3 is
    ``interpolate``, and 4 is that with a rate that falls linearly over the rounds.
    """
    return Algorithm("fedlpp", quantizer, adapters_only=True)


def fedsp() -> Algorithm:
    """FedSP (arXiv 2311.06805): soft prompts for a model that stays on the server.

    How is said in `prompted_model`.

    No round tells anything of that model, and none changes it. But the auxiliary model is distilled
    from it before the first round, so what clients receive depends on it.
    """
    broken = frozenset({Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES})
    return Algorithm("fedsp", prompts_only=True, broken_promises=broken)


def make_algorithm(
    name: str, quantizer: Quantizer, p1: float, p2: float, sampling: Sampling = "bernoulli"
) -> Algorithm:
    """Makes an algorithm by its name; it takes of the settings what it uses.

    Raises:
      ValueError: The name is unknown.
    """
    makers = {
        "fedavg": fedavg,
        "fedsn": lambda: fedsn(p1, p2, sampling),
        "fedq": lambda: fedq(quantizer),
        "fedqsn": lambda: fedqsn(quantizer, p1=p1, p2=p2, sampling=sampling),
        "fedlpp": lambda: fedlpp(quantizer),
        "fedsp": fedsp,
    }
    if name not in makers:
        raise ValueError(f"algorithm = {name!r}: allowed are {', '.join(makers)}")
    return makers[name]()
