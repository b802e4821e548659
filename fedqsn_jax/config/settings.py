"""The settings of a run: frozen dataclasses, a line a field.

To add a field: a line beside the others, ``name: type = field(default, allowed, help, used)``. All
that is said of it, also in ``configs/README.md``, is made of that line; see `fields`. Run ``python
-m fedqsn_jax.tools.configuration_table`` afterwards.
"""

import dataclasses
from typing import Any

from fedqsn_jax.config.choices import (
    ALGORITHMS,
    CODEBOOKS,
    COHORT_SAMPLING,
    COMPUTE_DTYPES,
    FEDSP,
    MASKS_PER,
    PARALLELISM,
    RULES,
    SERVER_OPTIMIZERS,
    TUNED,
)
from fedqsn_jax.config.evaluation_settings import (
    CheckpointConfig,
    EvaluationConfig,
    GenerationConfig,
)
from fedqsn_jax.config.fields import Condition, between, both, field, one_of, section, unless, when
from fedqsn_jax.config.problem_settings import (
    STEPS,
    DataConfig,
    ModelConfig,
    PretrainingConfig,
    TrainingConfig,
)

_HIDES = when("algorithm", "fedsn", "fedqsn")
_QUANTIZES = when("algorithm", "fedq", "fedqsn", "fedlpp")
_STRAGGLING = unless(".stragglers", 0.0)
_AUXILIARY = unless(".auxiliary_share", 0.0)
_DISTILS = unless("fedsp.distillation_steps", 0)
_CODED = unless("upload.bits", 0)
_ADAPTED = unless("lora.rank", 0)
_ONE_WAY = when("broadcast.every", 0)
_PRIVATE = unless("privacy.clip", 0.0)
_CLIENT_MASKED = both(_HIDES, unless("p2", 0.0))
_SCALE_CHOSEN = both(_ONE_WAY, when(".scale", 0.0))


def _nothing_masked(config: Any, section: str = "") -> str | None:
    if config.p1 or config.p2:
        return _HIDES.unmet(config, section)
    return _HIDES.unmet(config, section) or "p1 = 0 and p2 = 0"


def _nothing_at_sites(config: Any, section: str) -> str | None:
    # Adapters have sites of their own, with a model that is public the only ones.
    if config.algorithm == "fedlpp":
        return "algorithm = 'fedlpp'"
    if config.upload.bits or not _QUANTIZES.unmet(config, section):
        return None
    return _nothing_masked(config)


_MASKED = Condition(f"{_HIDES.words} and `p1` or `p2` is above 0", _nothing_masked)
_AT_SITES = Condition(
    "something is hidden or quantized, there or back, and `algorithm` is not fedlpp",
    _nothing_at_sites,
)


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are then what is trained; see `ClientConfig.trained`."""

    rank: int = field(0, between(0), "rank of the adapters; 0: none")
    alpha: float = field(0.0, between(0), "`A B` is multiplied by alpha / rank; 0: by 1", _ADAPTED)
    matrices: tuple[str, ...] = field(
        (), None, "patterns of adapted matrices; none: every one that `sites='all'` hides", _ADAPTED
    )
    quantize: bool = field(
        False, None, "whether adapters are quantized on their way to clients", _ADAPTED
    )
    public_base: bool = field(
        False, None, "whether clients have the model already; only adapters are secret, and travel"
    )


@dataclasses.dataclass(frozen=True)
class FedSPConfig:
    """FedSP's prompts and the small model on which clients tune them, at ``client.learning_rate``.

    The settings of ``client`` are those of the prompts, and of its steps both have a share. Layers
    count from 0 on, or from the last, -1, back. Those that the small model applies, passes times
    layers of them, stand for the full model's last ones, which are the layers that have prompts.
    """

    prompts: int = field(8, between(1), "keys and values in each layer that has prompts")
    tuned: tuple[str, ...] = field(
        TUNED[:1],
        one_of(*TUNED),
        "what clients tune and return, with `client`'s optimizer and rate",
    )
    layers: tuple[int, ...] = field(
        (-1,), None, "the model's layers that clients get, from 0 on, or from the last, -1, back"
    )
    passes: int = field(
        1,
        between(1),
        "times that these are applied, one after the other; as many of the model's last "
        "layers have prompts",
    )
    distillation_steps: int = field(
        300,
        STEPS,
        "steps that make them like the whole model, on `pretraining.batch_size` of all "
        "private rows, without labels",
    )
    distillation_rate: float = field(1e-3, between(0), "Adam's peak rate in these steps", _DISTILS)
    distillation_noise: float = field(
        1.0,
        between(0),
        "largest standard deviation of noise in the prompts in these steps",
        _DISTILS,
    )
    temperature: float = field(
        1.0, between(1e-3), "of both models' logits in these steps", _DISTILS
    )
    auxiliary_share: float = field(
        0.5, between(0, 1), "of a client's steps, for the small model's layers"
    )
    auxiliary_rate: float = field(1e-4, between(0), "Adam's rate in them", _AUXILIARY)


@dataclasses.dataclass(frozen=True)
class ClientConfig(TrainingConfig):
    """A client's local training in one round. Its optimizer starts afresh each round."""

    steps: int = field(0, STEPS, "local steps; 0: use epochs")
    epochs: int = field(
        1,
        between(1, 1_000_000),
        "passes over the client's rows",
        when(".steps", 0),
    )
    proximal: float = field(0.0, between(0), "FedProx's mu; 0: no proximal term")
    label_smoothing: float = field(0.0, between(0, below=1), "of completions; the server's too")
    compute_dtype: str = field(
        "float32",
        one_of(*COMPUTE_DTYPES),
        "of forward and backward pass; parameters, loss and optimizer stay float32, and "
        "evaluation too, but for language models",
    )
    trained: tuple[str, ...] = field(
        (),
        None,
        "names (all, lora, head, biases, norms) or patterns of the tensors that are trained; "
        "none: adapters if there are any, otherwise all",
    )


@dataclasses.dataclass(frozen=True)
class CohortConfig:
    """Who takes part in a round, and how the client axis is run."""

    size: int = field(10, between(1), "clients a round; of Poisson cohorts their mean number")
    sampling: str = field(
        "without_replacement",
        one_of(*COHORT_SAMPLING),
        "how they are drawn: so many without replacement, or each on its own, which takes less "
        "noise for the same privacy",
    )
    parallelism: str = field(
        "auto",
        one_of(*PARALLELISM),
        "how clients are run: one by one, side by side, or over devices",
    )
    chunk_size: int = field(0, between(0), "clients at once on a device; 0: what fits and pays")
    devices: int = field(0, between(0), "devices that share a cohort; 0: all of them")


@dataclasses.dataclass(frozen=True)
class ParticipationConfig:
    """What comes back from the clients of a cohort; every one of them receives its proxy."""

    dropout: float = field(
        0.0,
        between(0, 1),
        "probability that a client of the cohort returns nothing; it has received its proxy",
    )
    stragglers: float = field(0.0, between(0, 1), "probability that a client is cut off early")
    straggler_share: float = field(
        0.5, between(0, 1), "share of its steps that a straggler takes, at least one", _STRAGGLING
    )
    nan: float = field(0.0, between(0, 1), "probability of an update that is NaN, put in to test")
    lost_copies: float = field(
        0.0,
        between(0, 1),
        "probability that a client has lost its proxy, which it then is sent again",
        _ONE_WAY,
    )


@dataclasses.dataclass(frozen=True)
class UploadConfig:
    """How updates travel; what is not quantized is float32."""

    bits: int = field(
        0, between(0, 8), "width of a code of the sites' kernels in updates; 0: not quantized"
    )
    block_size: int = field(64, between(1), "entries of a column that share a scale", _CODED)
    codebook: str = field("normal_float", one_of(*CODEBOOKS), "levels of the quantizer", _CODED)
    error_feedback: bool = field(
        False,
        None,
        "clients keep what quantization takes, and send it later; takes memory of a copy of "
        "the kernels for each client of the population",
    )


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Aggregation of the clients' deltas into the hidden model."""

    optimizer: str = field("sgd", one_of(*SERVER_OPTIMIZERS), "server optimizer, from optax")
    learning_rate: float = field(1.0, between(0), "server rate; 1 with sgd adds the mean delta")
    momentum: float = field(0.0, between(0, below=1), "momentum", when(".optimizer", "sgd"))
    weighting: str = field("data", one_of("data", "uniform"), "a client's weight in the mean")
    normalize: str = field("mean", one_of("mean", "coverage"), "divide by all, or by who saw it")
    rule: str = field(
        "delta",
        one_of(*RULES),
        "what the mean delta is added to: the hidden model, or what was sent",
    )
    decay: str = field(
        "none", one_of("none", "linear"), "whether the server rate falls to 0 over all rounds"
    )
    clip_norm: float = field(
        0.0, between(0), "largest L2 norm of a client's delta, all tensors together; 0: no limit"
    )
    scale: float = field(
        1.0,
        between(0),
        "what the mean of all deltas is multiplied by; 0: at each evaluation the best of .5 to 12 "
        "on the server's validation rows",
        _ONE_WAY,
    )
    validation_rows: int = field(
        500,
        between(0),
        "the last private rows, so many, are kept from all training to choose that scale",
        _SCALE_CHOSEN,
    )


@dataclasses.dataclass(frozen=True)
class BroadcastConfig:
    """What of what was learned is sent back to clients."""

    every: int = field(
        1,
        between(0),
        "rounds after which what was learned is sent to clients; 0: never, one-way rounds",
    )
    share: float = field(
        1.0, between(1e-6, 1), "how much of what was learned is sent; not with one-way rounds"
    )


@dataclasses.dataclass(frozen=True)
class PrivacyConfig:
    """Differential privacy of a client with all its rows; the server adds the noise."""

    clip: float = field(
        0.0,
        between(0),
        "largest L2 norm of what a client returns, all tensors together; 0: no privacy",
    )
    noise: float = field(
        0.0,
        between(0),
        "noise multiplier: its standard deviation on the sum of updates over `clip`",
        _PRIVATE,
    )
    epsilon: float = field(
        0.0,
        between(0),
        "of all rounds together, from which the noise is found; 0: `noise` is given",
        _PRIVATE,
    )
    delta: float = field(1e-5, between(1e-30, below=1), "at which epsilon is told", _PRIVATE)


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = field(0, between(0, below=2**32), "fixes everything; in simulation not a secret")
    rounds: int = field(60, STEPS, "federated rounds in all")
    rounds_per_call: int = field(5, between(1), "rounds a compiled call; it stops at multiples")
    algorithm: str = field("fedqsn", one_of(*ALGORITHMS), "what clients receive")
    p1: float = field(
        0.2, between(0, below=1), "probability that a column is hidden for good", _HIDES
    )
    p2: float = field(
        0.2, between(0, below=1), "probability that a client's round hides a column", _HIDES
    )
    sampling: str = field(
        "bernoulli", one_of("bernoulli", "fixed_count"), "how masks are drawn", _MASKED
    )
    mask_per: str = field(
        "round",
        one_of(*MASKS_PER),
        "whether a client's mask is drawn for each round, or once for the client",
        _CLIENT_MASKED,
    )
    bits: int = field(4, between(1, 8), "width of a code", _QUANTIZES)
    block_size: int = field(64, between(1), "entries of a column that share a scale", _QUANTIZES)
    codebook: str = field("normal_float", one_of(*CODEBOOKS), "levels of the quantizer", _QUANTIZES)
    blocks: str = field(
        "column",
        one_of("column", "row"),
        "what a block lies in: a column, or a matrix row by row, which mixes columns",
        _QUANTIZES,
    )
    tracing_margin: float = field(
        0.0,
        between(0, 0.45),
        "how near to a border of two codes entries are rounded by a secret of each client's, by "
        "which a leaked model is traced; 0: not at all",
        _QUANTIZES,
    )
    sites: str = field(
        "all",
        one_of("all", "residual"),
        "which layers have mask sites; residual: those that write to the residual stream",
        _AT_SITES,
    )
    site_rules: tuple[str, ...] = field((), None, "rules that go before the package's own")
    quantize_embeddings: bool = field(
        False, None, "whether embeddings and output layers are sent as codes; never hidden"
    )
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    pretraining: PretrainingConfig = section(
        PretrainingConfig, unless("pretraining.steps", 0), ("steps", "batch_size", "dropout")
    )
    lora: LoraConfig = section(LoraConfig)
    fedsp: FedSPConfig = section(FedSPConfig, when("algorithm", FEDSP))
    client: ClientConfig = section(ClientConfig)
    cohort: CohortConfig = section(CohortConfig)
    participation: ParticipationConfig = section(ParticipationConfig)
    upload: UploadConfig = section(UploadConfig)
    server: ServerConfig = section(ServerConfig)
    broadcast: BroadcastConfig = section(BroadcastConfig)
    privacy: PrivacyConfig = section(PrivacyConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    generation: GenerationConfig = section(
        GenerationConfig, unless("generation.prompts", 0), ("prompts", "new_tokens")
    )
    checkpoint: CheckpointConfig = section(CheckpointConfig)


def chooses_scale(config: Config) -> bool:
    """Whether a run chooses the scale of what it learned itself, on rows of the server."""
    return _SCALE_CHOSEN.unmet(config, "server.") is None
