"""The settings of a run: frozen dataclasses, a line a field.

To add a field: a line beside the others, ``name: type = field(default, allowed, help, used)``. All
that is said of it, also in ``configs/README.md``, is made of that line; see `fields`. Run ``python
-m fedqsn_jax.tools.configuration_table`` afterwards.
"""

import dataclasses
from typing import Any

from fedqsn_jax.config.choices import (
    ALGORITHMS,
    ATTENTIONS,
    CLASSIFICATION,
    CODEBOOKS,
    COMPUTE_DTYPES,
    DATA_SETS,
    FEDSP,
    IMAGE_MODELS,
    LANGUAGE,
    MODELS,
    OPTIMIZERS,
    PARALLELISM,
    PARTITIONS,
    POOLINGS,
    RESIDENCES,
    RULES,
    SCHEDULES,
    SERVER_OPTIMIZERS,
    STEMS,
    TEXT,
    TUNED,
)
from fedqsn_jax.config.fields import Condition, between, both, field, one_of, section, unless, when

_HIDES = when("algorithm", "fedsn", "fedqsn")
_QUANTIZES = when("algorithm", "fedq", "fedqsn", "fedlpp")
_DIRICHLET, _SHARDS = when(".partition", "dirichlet"), when(".partition", "shards")
_SGD, _ADAMW = when(".optimizer", "sgd"), when(".optimizer", "adamw")
_LINEAR = unless(".schedule", "constant")
_STRAGGLING = unless(".stragglers", 0.0)
_AUXILIARY = unless(".auxiliary_share", 0.0)
_DISTILS = unless("fedsp.distillation_steps", 0)
_TEXTS = when("data.name", TEXT)
_WRITTEN = both(_TEXTS, unless("data.task", *CLASSIFICATION), when("data.labels", ()))
_LANGUAGE = when("model.name", LANGUAGE)
_MLP, _CNN, _RESNET = (when("model.name", name) for name in IMAGE_MODELS)
_CODED = unless("upload.bits", 0)
_ADAPTED = unless("lora.rank", 0)


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
class DataConfig:
    """Which data, and how it is divided among server and clients."""

    name: str = field("digits", one_of(*DATA_SETS), "data set")
    directory: str = field("", None, "where TFDS data sets lie; empty: TFDS's default")
    clients: int = field(20, between(1), "number of clients", unless(".partition", "natural"))
    partition: str = field("dirichlet", one_of(*PARTITIONS), "how rows are dealt to clients")
    alpha: float = field(0.5, between(1e-6), "concentration of Dirichlet skew", _DIRICHLET)
    shards_per_client: int = field(2, between(1), "label-sorted shards a client", _SHARDS)
    private_rows: int = field(200, between(0), "rows that the server keeps to pre-train on")
    train_rows: int = field(0, between(0), "rows for server and clients together; 0: all")
    test_rows: int = field(360, between(1), "rows held out for testing, where the set has no split")
    held_out_share: float = field(0.0, between(0, below=1), "of a client's rows, for testing it")
    held_out_clients: int = field(0, between(0), "clients that never take part, for testing")
    resident: str = field("auto", one_of(*RESIDENCES), "where clients' rows live between rounds")
    # Of texts, name = "text"; see `data.text.TextSettings`.
    task: str = field("", None, "a task of the package, or own: of columns named here", _TEXTS)
    train: str = field("", None, "source: tsv:FILE, jsonl:FILE, e2e:FILE or tfds:NAME", _TEXTS)
    test: str = field("", None, "of test rows; empty: TFDS's split, else test_rows", _TEXTS)
    columns: tuple[str, ...] = field((), None, "input columns, where not the task's", _TEXTS)
    target: str = field("", None, "column of label or completion, where not the task's", _TEXTS)
    labels: tuple[str, ...] = field((), None, "names of labels; with own: to classify", _TEXTS)
    template: str = field("", None, "prompt of an own task, with {columns}", _WRITTEN)
    length: int = field(0, between(0), "tokens a row; 0: the task's", _TEXTS)
    target_length: int = field(0, between(0), "of an encoder-decoder's target; 0: length", _WRITTEN)
    truncate: bool = field(True, None, "whether longer rows are cut, not refused", _TEXTS)
    separator: bool = field(True, None, "whether end-of-text ends a decoder's prompt", _WRITTEN)
    cache: str = field("", None, "directory of tokenized rows; empty: the user's cache", _TEXTS)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    name: str = field("mlp", one_of(*MODELS), "architecture")
    hidden: tuple[int, ...] = field((256, 256), between(1), "widths of hidden layers", _MLP)
    channels: tuple[int, ...] = field((32, 64), between(1), "channels of the convolutions", _CNN)
    dense: int = field(128, between(1), "width of the hidden dense layer", _CNN)
    width: int = field(64, between(1), "channels of the first stage", _RESNET)
    stem: str = field("cifar", one_of(*STEMS), "stem: 3x3, or 7x7 and pooling", _RESNET)
    pretrained: str = field("", None, "a directory, or a name on the hub", _LANGUAGE)
    pooling: str = field("auto", one_of(*POOLINGS), "of encoders; auto: the family's", _LANGUAGE)
    attention: str = field("auto", one_of(*ATTENTIONS), "kernel of attention", _LANGUAGE)
    unroll: int = field(1, between(1), "layers in a step of the scan over layers", _LANGUAGE)
    remat: bool = field(False, None, "compute activations again going backward", _LANGUAGE)


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training by gradients: what the server's own and the clients' have in common."""

    steps: int = field(0, between(0), "steps")
    batch_size: int = field(32, between(1), "rows a step")
    optimizer: str = field("sgd", one_of(*OPTIMIZERS), "optimizer")
    learning_rate: float = field(0.1, between(0), "rate; with schedule=linear its peak")
    momentum: float = field(0.0, between(0, below=1), "momentum of sgd", _SGD)
    weight_decay: float = field(0.0, between(0), "decoupled weight decay", _ADAMW)
    schedule: str = field("constant", one_of(*SCHEDULES), "rate over the steps; linear: falls")
    warmup: float = field(0.06, between(0, 1), "share of the steps in which it rises", _LINEAR)
    accumulate: int = field(1, between(1), "steps whose gradients make one update")
    clip_norm: float = field(0.0, between(0), "largest norm of an update's gradient; 0: any")
    dropout: float = field(0.0, between(0, below=1), "dropout in hidden layers")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(TrainingConfig):
    """The server's own training on its private rows, before the first round."""

    steps: int = field(400, between(0), "steps; 0: start from what the model is")
    batch_size: int = field(64, between(1), "rows a step")
    rows: int = field(0, between(0), "of the private rows, the first so many; 0: all")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are then what is trained; see `ClientConfig.trained`."""

    rank: int = field(0, between(0), "rank of the adapters; 0: none")
    alpha: float = field(0.0, between(0), "A B is multiplied by alpha / rank; 0: by 1", _ADAPTED)
    matrices: tuple[str, ...] = field(
        (), None, "patterns of matrices; none: all hideable", _ADAPTED
    )
    quantize: bool = field(False, None, "whether they are quantized to clients", _ADAPTED)
    public_base: bool = field(False, None, "clients have the model; only adapters are secret")


@dataclasses.dataclass(frozen=True)
class FedSPConfig:
    """FedSP's prompts and the small model on which clients tune them, at ``client.learning_rate``.

    The settings of ``client`` are those of the prompts, and of its steps both have a share. Layers
    count from 0 on, or from the last, -1, back. Those that the small model applies, passes times
    layers of them, stand for the full model's last ones, which are the layers that have prompts.
    """

    prompts: int = field(8, between(1), "keys and values in each layer that has prompts")
    tuned: tuple[str, ...] = field(TUNED[:1], one_of(*TUNED), "what clients tune and return")
    layers: tuple[int, ...] = field((-1,), None, "the model's layers that clients get")
    passes: int = field(1, between(1), "times that these are applied, one after the other")
    distillation_steps: int = field(300, between(0), "steps that make them like the whole model")
    distillation_rate: float = field(1e-3, between(0), "Adam's peak rate in these steps", _DISTILS)
    distillation_noise: float = field(1.0, between(0), "largest deviation of prompts", _DISTILS)
    temperature: float = field(1.0, between(1e-3), "of both models' logits there", _DISTILS)
    auxiliary_share: float = field(0.5, between(0, 1), "of a client's steps, for the small model")
    auxiliary_rate: float = field(1e-4, between(0), "Adam's rate in them", _AUXILIARY)


@dataclasses.dataclass(frozen=True)
class ClientConfig(TrainingConfig):
    """A client's local training in one round. Its optimizer starts afresh each round."""

    steps: int = field(0, between(0), "local steps; 0: use epochs")
    epochs: int = field(1, between(1), "passes over the client's rows", when(".steps", 0))
    proximal: float = field(0.0, between(0), "FedProx's mu; 0: no proximal term")
    label_smoothing: float = field(0.0, between(0, below=1), "of completions; the server's too")
    compute_dtype: str = field("float32", one_of(*COMPUTE_DTYPES), "of forward and backward pass")
    trained: tuple[str, ...] = field((), None, "tensors that are trained; see below")


@dataclasses.dataclass(frozen=True)
class CohortConfig:
    """Who takes part in a round, and how the client axis is run."""

    size: int = field(10, between(1), "clients a round, drawn without replacement")
    parallelism: str = field("auto", one_of(*PARALLELISM), "how clients are run; see below")
    chunk_size: int = field(0, between(0), "clients at once on a device; 0: what fits and pays")
    devices: int = field(0, between(0), "devices that share a cohort; 0: all of them")


@dataclasses.dataclass(frozen=True)
class ParticipationConfig:
    """What comes back from the clients of a cohort; every one of them receives its proxy."""

    dropout: float = field(0.0, between(0, 1), "probability that a client returns nothing")
    stragglers: float = field(0.0, between(0, 1), "probability that a client is cut off early")
    straggler_share: float = field(0.5, between(0, 1), "share of its steps", _STRAGGLING)
    nan: float = field(0.0, between(0, 1), "probability of an update that is NaN, put in to test")


@dataclasses.dataclass(frozen=True)
class UploadConfig:
    """How updates travel; what is not quantized is float32."""

    bits: int = field(0, between(0, 8), "width of a code of the sites' kernels; 0: not quantized")
    block_size: int = field(64, between(1), "entries of a column that share a scale", _CODED)
    codebook: str = field("normal_float", one_of(*CODEBOOKS), "levels of the quantizer", _CODED)
    error_feedback: bool = field(False, None, "clients keep what is lost, and send it later")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Aggregation of the clients' deltas into the hidden model."""

    optimizer: str = field("sgd", one_of(*SERVER_OPTIMIZERS), "server optimizer, from optax")
    learning_rate: float = field(1.0, between(0), "server rate; 1 with sgd adds the mean delta")
    momentum: float = field(0.0, between(0, below=1), "momentum of sgd", _SGD)
    weighting: str = field("data", one_of("data", "uniform"), "a client's weight in the mean")
    normalize: str = field("mean", one_of("mean", "coverage"), "divide by all, or by who saw it")
    rule: str = field("delta", one_of(*RULES), "what the mean delta is added to; see below")
    decay: str = field("none", one_of("none", "linear"), "of the server rate over all rounds")
    clip_norm: float = field(0.0, between(0), "largest L2 norm of a client's delta; 0: no limit")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and how the four views are evaluated."""

    every: int = field(1, between(1), "rounds between evaluations; the last is always evaluated")
    batch_size: int = field(512, between(1), "rows at a time")
    proxy_samples: int = field(8, between(2), "client masks that the proxy view averages over")
    attackers: tuple[int, ...] = field((1, 10), between(1), "numbers of colluding clients")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The texts that every view writes after the last round, where the task is to write."""

    prompts: int = field(0, between(0), "distinct test prompts that are answered; 0: none")
    batch_size: int = field(64, between(1), "prompts at a time")
    proxy_samples: int = field(2, between(1), "client masks that the proxy view averages over")
    new_tokens: int = field(64, between(1), "most tokens of a text")
    beams: int = field(10, between(1), "hypotheses of the beam search; 1: greedy")
    no_repeat_ngram: int = field(4, between(0), "so many tokens never occur twice; 0: they may")
    length_penalty: float = field(0.9, None, "exponent of the length that a score is divided by")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the hidden model is saved, and which saves are kept."""

    every: int = field(10, between(1), "rounds between saves; the last round is always saved")
    keep_latest: int = field(2, between(1), "latest saves kept")
    keep_best: int = field(1, between(0), "of the saved rounds, the best so many by global score")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = field(0, between(0, below=2**32), "fixes everything; in simulation not a secret")
    rounds: int = field(60, between(0), "federated rounds in all")
    rounds_per_call: int = field(5, between(1), "rounds a compiled call; it stops at multiples")
    algorithm: str = field("fedqsn", one_of(*ALGORITHMS), "what clients receive")
    p1: float = field(0.2, between(0, below=1), "share of columns hidden for good", _HIDES)
    p2: float = field(0.2, between(0, below=1), "share hidden in a client's round", _HIDES)
    sampling: str = field("bernoulli", one_of("bernoulli", "fixed_count"), "draw of masks", _MASKED)
    bits: int = field(4, between(1, 8), "width of a code", _QUANTIZES)
    block_size: int = field(64, between(1), "entries of a column that share a scale", _QUANTIZES)
    codebook: str = field("normal_float", one_of(*CODEBOOKS), "levels of the quantizer", _QUANTIZES)
    blocks: str = field("column", one_of("column", "row"), "how blocks run; see below", _QUANTIZES)
    sites: str = field("all", one_of("all", "residual"), "which layers have mask sites", _AT_SITES)
    site_rules: tuple[str, ...] = field((), None, "rules that go before the package's own")
    quantize_embeddings: bool = field(False, None, "codes for embeddings and output layers too")
    data: DataConfig = section(DataConfig)
    model: ModelConfig = section(ModelConfig)
    pretraining: PretrainingConfig = section(PretrainingConfig)
    lora: LoraConfig = section(LoraConfig)
    fedsp: FedSPConfig = section(FedSPConfig, when("algorithm", FEDSP))
    client: ClientConfig = section(ClientConfig)
    cohort: CohortConfig = section(CohortConfig)
    participation: ParticipationConfig = section(ParticipationConfig)
    upload: UploadConfig = section(UploadConfig)
    server: ServerConfig = section(ServerConfig)
    evaluation: EvaluationConfig = section(EvaluationConfig)
    generation: GenerationConfig = section(GenerationConfig)
    checkpoint: CheckpointConfig = section(CheckpointConfig)
