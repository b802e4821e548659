"""The configuration of a run: frozen dataclasses that know what is allowed.

At the edge a configuration is an ml_collections ``ConfigDict`` (see `default_config`), which files
under ``configs/`` fill and flags override. `resolve` turns it at once into the dataclasses below;
everything inside the package sees only those.
"""

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from typing import Any

import ml_collections
import numpy as np

from fedqsn_jax.core.errors import UserError

FEDSP = "fedsp"
ALGORITHMS = ("fedavg", "fedsn", "fedq", "fedqsn", "fedlpp", FEDSP)
CODEBOOKS = ("normal_float", "symmetric_normal_float", "uniform")
IMAGE_SETS = ("digits", "mnist", "emnist", "cifar10")
TEXT = "text"
DATA_SETS = (*IMAGE_SETS, TEXT)
IMAGE_MODELS = ("mlp", "cnn", "resnet18")
LANGUAGE = "language"
MODELS = (*IMAGE_MODELS, LANGUAGE)
STEMS = ("cifar", "imagenet")
OPTIMIZERS = ("sgd", "adam", "adamw")
SCHEDULES = ("constant", "linear")
ATTENTIONS = ("auto", "xla", "cudnn")
POOLINGS = ("auto", "cls", "mean")
SERVER_OPTIMIZERS = ("sgd", "adagrad", "adam", "yogi", "lamb", "adafactor")
PARTITIONS = ("dirichlet", "shards", "natural", "iid")
COMPUTE_DTYPES = ("float32", "bfloat16")
RESIDENCES = ("auto", "device", "host")
PARALLELISM = ("auto", "scan", "vmap", "mesh")
MASKS_PER = ("round", "client")
RULES = ("delta", "from_sent", "interpolate")
TUNED = ("prompts", "classifier")


class ConfigError(UserError):
    """A mistake in a configuration; the message is one line: field, value, what is allowed."""


def _one_of(*allowed: str) -> Any:
    return {"one_of": allowed}


def _range(low: float, high: float | None = None, *, below: float | None = None) -> Any:
    return {"low": low, "high": high, "below": below}


def _field(default: Any, allowed: Any = None, help: str = "") -> Any:
    return dataclasses.field(default=default, metadata={"allowed": allowed, "help": help})


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is divided among server and clients."""

    name: str = _field("digits", _one_of(*DATA_SETS), "data set")
    directory: str = _field("", None, "where TFDS data sets lie; empty: TFDS's default")
    clients: int = _field(20, _range(1), "number of clients; ignored by the natural partition")
    partition: str = _field("dirichlet", _one_of(*PARTITIONS), "how rows are dealt to clients")
    alpha: float = _field(0.5, _range(1e-6), "concentration of the Dirichlet label skew")
    shards_per_client: int = _field(2, _range(1), "label-sorted shards a client (partition=shards)")
    private_rows: int = _field(200, _range(0), "rows that the server keeps to pre-train on")
    train_rows: int = _field(0, _range(0), "rows for server and clients together; 0: all")
    test_rows: int = _field(360, _range(1), "rows held out for testing, where the set has no split")
    held_out_share: float = _field(0.0, _range(0, below=1), "of a client's rows, for testing it")
    held_out_clients: int = _field(0, _range(0), "clients that never take part, for testing")
    resident: str = _field("auto", _one_of(*RESIDENCES), "where clients' rows live between rounds")
    # Of texts, name = "text"; see `data.text.TextSettings`.
    task: str = _field("", None, "a task of the package, or own: the columns are named below")
    train: str = _field("", None, "source of rows: tsv:FILE, jsonl:FILE, e2e:FILE or tfds:NAME")
    test: str = _field("", None, "source of test rows; empty: of TFDS its split, else test_rows")
    columns: tuple[str, ...] = _field((), None, "input columns, where not the task's")
    target: str = _field("", None, "column of label or completion, where not the task's")
    labels: tuple[str, ...] = _field((), None, "names of the labels; with own: classification")
    template: str = _field("", None, "prompt of an own task, with {columns}")
    length: int = _field(0, _range(0), "tokens a row; 0: the task's")
    target_length: int = _field(0, _range(0), "tokens of an encoder-decoder's target; 0: length")
    truncate: bool = _field(True, None, "whether longer rows are cut; else they are refused")
    separator: bool = _field(True, None, "whether end-of-text ends a decoder's prompt")
    cache: str = _field("", None, "directory of tokenized rows; empty: the user's cache")


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    name: str = _field("mlp", _one_of(*MODELS), "architecture")
    hidden: tuple[int, ...] = _field((256, 256), _range(1), "widths of the MLP's hidden layers")
    channels: tuple[int, ...] = _field((32, 64), _range(1), "channels of the CNN's convolutions")
    dense: int = _field(128, _range(1), "width of the CNN's hidden dense layer")
    width: int = _field(64, _range(1), "channels of the ResNet's first stage")
    stem: str = _field("cifar", _one_of(*STEMS), "the ResNet's stem: 3x3, or 7x7 and pooling")
    pretrained: str = _field("", None, "of language models: a directory, or a name on the hub")
    pooling: str = _field("auto", _one_of(*POOLINGS), "of encoders; auto: the family's, cls")
    attention: str = _field("auto", _one_of(*ATTENTIONS), "kernel of a language model's attention")
    unroll: int = _field(1, _range(1), "layers in a step of a language model's scan")
    remat: bool = _field(False, None, "whether activations are computed again going backward")


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training by gradients: what the server's own and the clients' have in common."""

    steps: int = _field(0, _range(0), "steps")
    batch_size: int = _field(32, _range(1), "rows a step")
    optimizer: str = _field("sgd", _one_of(*OPTIMIZERS), "optimizer")
    learning_rate: float = _field(0.1, _range(0), "rate; with schedule=linear its peak")
    momentum: float = _field(0.0, _range(0, below=1), "momentum of sgd")
    weight_decay: float = _field(0.0, _range(0), "decoupled weight decay (adamw)")
    schedule: str = _field("constant", _one_of(*SCHEDULES), "rate over the steps; linear: falls")
    warmup: float = _field(0.06, _range(0, 1), "share of the steps in which a linear rate rises")
    accumulate: int = _field(1, _range(1), "steps whose gradients make one update")
    clip_norm: float = _field(0.0, _range(0), "largest norm of an update's gradient; 0: any")
    dropout: float = _field(0.0, _range(0, below=1), "dropout in hidden layers")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(TrainingConfig):
    """The server's own training on its private rows, before the first round."""

    steps: int = _field(400, _range(0), "steps; 0: start from what the model is")
    batch_size: int = _field(64, _range(1), "rows a step")
    rows: int = _field(0, _range(0), "of the private rows, the first so many; 0: all")


@dataclasses.dataclass(frozen=True)
class LoraConfig:
    """Low-rank adapters, which are then what is trained; see `ClientConfig.trained`."""

    rank: int = _field(0, _range(0), "rank of the adapters; 0: none")
    alpha: float = _field(0.0, _range(0), "A B is multiplied by alpha / rank; 0: by 1")
    matrices: tuple[str, ...] = _field((), None, "patterns of adapted matrices; none: all hideable")
    quantize: bool = _field(False, None, "whether adapters are quantized on their way to clients")
    public_base: bool = _field(False, None, "clients have the model; only adapters are secret")


@dataclasses.dataclass(frozen=True)
class FedSPConfig:
    """FedSP's prompts and the small model on which clients tune them, at ``client.learning_rate``.

    The settings of ``client`` are those of the prompts, and of its steps both have a share. Layers
    count from 0 on, or from the last, -1, back. Those that the small model applies, passes times
    layers of them, stand for the full model's last ones, which are the layers that have prompts.
    """

    prompts: int = _field(8, _range(1), "keys and values in each layer that has prompts")
    tuned: tuple[str, ...] = _field(TUNED[:1], _one_of(*TUNED), "what clients tune and return")
    layers: tuple[int, ...] = _field((-1,), None, "the model's layers that clients get")
    passes: int = _field(1, _range(1), "times that these are applied, one after the other")
    distillation_steps: int = _field(300, _range(0), "steps that make them like the whole model")
    distillation_rate: float = _field(1e-3, _range(0), "Adam's peak rate in these steps")
    distillation_noise: float = _field(1.0, _range(0), "of the prompts there, standard deviation")
    temperature: float = _field(1.0, _range(1e-3), "of both models' logits in these steps")
    auxiliary_share: float = _field(0.5, _range(0, 1), "of a client's steps, for the small model")
    auxiliary_rate: float = _field(1e-4, _range(0), "Adam's rate in them")


@dataclasses.dataclass(frozen=True)
class ClientConfig(TrainingConfig):
    """A client's local training in one round. Its optimizer starts afresh each round."""

    steps: int = _field(0, _range(0), "local steps; 0: use epochs")
    epochs: int = _field(1, _range(1), "passes over the client's rows, where steps is 0")
    proximal: float = _field(0.0, _range(0), "FedProx's mu; 0: no proximal term")
    label_smoothing: float = _field(0.0, _range(0, below=1), "of completions; the server's too")
    compute_dtype: str = _field("float32", _one_of(*COMPUTE_DTYPES), "of forward and backward pass")
    trained: tuple[str, ...] = _field((), None, "tensors that are trained; see below")


@dataclasses.dataclass(frozen=True)
class CohortConfig:
    """Who takes part in a round, and how the client axis is run."""

    size: int = _field(10, _range(1), "clients a round, drawn without replacement")
    parallelism: str = _field("auto", _one_of(*PARALLELISM), "how clients are run; see below")
    chunk_size: int = _field(0, _range(0), "clients at once on a device; 0: what fits and pays")
    devices: int = _field(0, _range(0), "devices that share a cohort; 0: all of them")


@dataclasses.dataclass(frozen=True)
class ParticipationConfig:
    """What comes back from the clients of a cohort; every one of them receives its proxy."""

    dropout: float = _field(0.0, _range(0, 1), "probability that a client returns nothing")
    stragglers: float = _field(0.0, _range(0, 1), "probability that a client is cut off early")
    straggler_share: float = _field(0.5, _range(0, 1), "share of its steps that a straggler takes")
    nan: float = _field(0.0, _range(0, 1), "probability of an update that is NaN, put in to test")


@dataclasses.dataclass(frozen=True)
class UploadConfig:
    """How updates travel; what is not quantized is float32."""

    bits: int = _field(0, _range(0, 8), "width of a code of the sites' kernels; 0: not quantized")
    block_size: int = _field(64, _range(1), "entries of a column that share a scale")
    codebook: str = _field("normal_float", _one_of(*CODEBOOKS), "levels of the quantizer")
    error_feedback: bool = _field(False, None, "clients keep what is lost, and send it later")


@dataclasses.dataclass(frozen=True)
class ServerConfig:
    """Aggregation of the clients' deltas into the hidden model."""

    optimizer: str = _field("sgd", _one_of(*SERVER_OPTIMIZERS), "server optimizer, from optax")
    learning_rate: float = _field(1.0, _range(0), "server rate; 1 with sgd adds the mean delta")
    momentum: float = _field(0.0, _range(0, below=1), "momentum of sgd")
    weighting: str = _field("data", _one_of("data", "uniform"), "a client's weight in the mean")
    normalize: str = _field("mean", _one_of("mean", "coverage"), "divide by all, or by who saw it")
    rule: str = _field("delta", _one_of(*RULES), "what the mean delta is added to; see below")
    decay: str = _field("none", _one_of("none", "linear"), "of the server rate over all rounds")
    clip_norm: float = _field(0.0, _range(0), "largest L2 norm of a client's delta; 0: no limit")
    scale: float = _field(1.0, _range(0), "of the mean delta in one-way rounds; 0: the best, tried")
    validation_rows: int = _field(500, _range(0), "last private rows, kept to choose that scale")


@dataclasses.dataclass(frozen=True)
class BroadcastConfig:
    """What of what was learned is sent back to clients."""

    every: int = _field(1, _range(0), "rounds until what was learned is sent; 0: never, one-way")
    share: float = _field(1.0, _range(1e-6, 1), "how much of what was learned is sent")


@dataclasses.dataclass(frozen=True)
class EvaluationConfig:
    """When and how the four views are evaluated."""

    every: int = _field(1, _range(1), "rounds between evaluations; the last is always evaluated")
    batch_size: int = _field(512, _range(1), "rows at a time")
    proxy_samples: int = _field(8, _range(2), "client masks that the proxy view averages over")
    attackers: tuple[int, ...] = _field((1, 10), _range(1), "numbers of colluding clients")


@dataclasses.dataclass(frozen=True)
class GenerationConfig:
    """The texts that every view writes after the last round, where the task is to write."""

    prompts: int = _field(0, _range(0), "distinct test prompts that are answered; 0: none")
    batch_size: int = _field(64, _range(1), "prompts at a time")
    proxy_samples: int = _field(2, _range(1), "client masks that the proxy view averages over")
    new_tokens: int = _field(64, _range(1), "most tokens of a text")
    beams: int = _field(10, _range(1), "hypotheses of the beam search; 1: greedy")
    no_repeat_ngram: int = _field(4, _range(0), "so many tokens never occur twice; 0: they may")
    length_penalty: float = _field(0.9, None, "exponent of the length that a score is divided by")


@dataclasses.dataclass(frozen=True)
class CheckpointConfig:
    """When the hidden model is saved, and which saves are kept."""

    every: int = _field(10, _range(1), "rounds between saves; the last round is always saved")
    keep_latest: int = _field(2, _range(1), "latest saves kept")
    keep_best: int = _field(1, _range(0), "of the saved rounds, the best so many by global score")


@dataclasses.dataclass(frozen=True)
class Config:
    """A whole run."""

    seed: int = _field(0, _range(0, below=2**32), "fixes everything; in simulation not a secret")
    rounds: int = _field(60, _range(0), "federated rounds in all")
    rounds_per_call: int = _field(5, _range(1), "rounds a compiled call; it stops at multiples")
    algorithm: str = _field("fedqsn", _one_of(*ALGORITHMS), "what clients receive")
    p1: float = _field(0.2, _range(0, below=1), "probability that a column is hidden for good")
    p2: float = _field(0.2, _range(0, below=1), "probability that a client's round hides a column")
    bits: int = _field(4, _range(1, 8), "width of a code")
    block_size: int = _field(64, _range(1), "entries of a column that share a scale")
    codebook: str = _field("normal_float", _one_of(*CODEBOOKS), "levels of the quantizer")
    blocks: str = _field("column", _one_of("column", "row"), "how blocks run; see below")
    sampling: str = _field("bernoulli", _one_of("bernoulli", "fixed_count"), "how masks are drawn")
    mask_per: str = _field("round", _one_of(*MASKS_PER), "client: it keeps its mask for good")
    sites: str = _field("all", _one_of("all", "residual"), "which layers have mask sites")
    site_rules: tuple[str, ...] = _field((), None, "rules that go before the package's own")
    quantize_embeddings: bool = _field(
        False, None, "whether embeddings and output layers are sent as codes; never hidden"
    )
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    pretraining: PretrainingConfig = dataclasses.field(default_factory=PretrainingConfig)
    lora: LoraConfig = dataclasses.field(default_factory=LoraConfig)
    fedsp: FedSPConfig = dataclasses.field(default_factory=FedSPConfig)
    client: ClientConfig = dataclasses.field(default_factory=ClientConfig)
    cohort: CohortConfig = dataclasses.field(default_factory=CohortConfig)
    participation: ParticipationConfig = dataclasses.field(default_factory=ParticipationConfig)
    upload: UploadConfig = dataclasses.field(default_factory=UploadConfig)
    server: ServerConfig = dataclasses.field(default_factory=ServerConfig)
    broadcast: BroadcastConfig = dataclasses.field(default_factory=BroadcastConfig)
    evaluation: EvaluationConfig = dataclasses.field(default_factory=EvaluationConfig)
    generation: GenerationConfig = dataclasses.field(default_factory=GenerationConfig)
    checkpoint: CheckpointConfig = dataclasses.field(default_factory=CheckpointConfig)


def default_config() -> ml_collections.ConfigDict:
    """Returns every field with its default, for a file under ``configs/`` to change."""
    return ml_collections.ConfigDict(to_dict(Config()))


def as_released(config: ml_collections.ConfigDict) -> None:
    """Sets the choices in which the code that the paper's authors released differs from ours.

    Masks of a fixed count, a codebook of ``2 ** bits + 1`` levels, blocks that mix columns (they
    let hidden values show), sites on the residual stream where the model has one, 4-bit updates,
    and aggregation onto what was sent.
    """
    config.sampling = "fixed_count"
    config.codebook = config.upload.codebook = "symmetric_normal_float"
    config.blocks = "row"
    config.upload.bits = 4
    config.server.rule = "from_sent"
    if config.model.name == LANGUAGE:
        config.sites = "residual"


def to_dict(config: Any) -> dict[str, Any]:
    """Returns a configuration as nested dictionaries, tuples kept."""
    return {
        field.name: to_dict(value) if dataclasses.is_dataclass(value) else value
        for field in dataclasses.fields(config)
        for value in [getattr(config, field.name)]
    }


def flatten(config: Config) -> dict[str, Any]:
    """Returns every field by its dotted name."""
    flat: dict[str, Any] = {}

    def visit(prefix: str, values: Mapping[str, Any]) -> None:
        for name, value in values.items():
            if isinstance(value, Mapping):
                visit(f"{prefix}{name}.", value)
            else:
                flat[prefix + name] = value

    visit("", to_dict(config))
    return flat


def with_fields(config: Any, values: Mapping[str, Any]) -> Any:
    """Returns a configuration with other values of some fields, which are not checked.

    Args:
      config: A `Config`, or a section of one.
      values: By the fields' dotted names. They may be traced scalars, where what reads them allows.
    """
    changed: dict[str, Any] = {}
    for name, value in values.items():
        first, _, rest = name.partition(".")
        if rest:
            value = with_fields(changed.get(first, getattr(config, first)), {rest: value})
        changed[first] = value
    return dataclasses.replace(config, **changed)


def resolve(values: Mapping[str, Any]) -> Config:
    """Checks nested values and returns them as a `Config`.

    Args:
      values: A ``ConfigDict`` or nested dictionaries. Fields that are missing take their defaults.

    Raises:
      ConfigError: A field is unknown, or its value has the wrong type or is out of range.
    """
    config = _resolve_section(Config, values, "")
    for name in ("p1", "p2"):
        if np.float32(getattr(config, name)) >= 1:
            raise ConfigError(
                f"{name} = {getattr(config, name)!r}: allowed is 0 to below 1, float32"
            )
    _check_language(config)
    _check_fedsp(config)
    _check_broadcast(config)
    if config.data.partition != "natural" and config.cohort.size > config.data.clients:
        raise ConfigError(
            f"cohort.size = {config.cohort.size}: allowed is at most data.clients = "
            f"{config.data.clients}"
        )
    if config.lora.rank == 0:
        needs = {
            f"algorithm = {config.algorithm!r}": config.algorithm == "fedlpp",
            "lora.public_base = True": config.lora.public_base,
            f"client.trained = {config.client.trained}": "lora" in config.client.trained,
        }
        for what, is_set in needs.items():
            if is_set:
                raise ConfigError(f"{what} with lora.rank = 0: allowed is a rank of 1 or more")
    for name, section in (("", config), ("upload.", config.upload)):
        if section.codebook == "symmetric_normal_float" and section.bits > 7:
            raise ConfigError(
                f"{name}bits = {section.bits}: allowed is at most 7 with {name}codebook = "
                f"'symmetric_normal_float', whose codes take one bit more"
            )
    if config.upload.error_feedback and not config.upload.bits:
        raise ConfigError(
            "upload.error_feedback = True with upload.bits = 0: nothing is lost; allowed are bits "
            "of 1 to 8"
        )
    return config


def _check_language(config: Config) -> None:
    if (config.data.name == TEXT) != (config.model.name == LANGUAGE):
        raise ConfigError(
            f"data.name = {config.data.name!r} with model.name = {config.model.name!r}: {TEXT!r} "
            f"and {LANGUAGE!r} go together"
        )
    if config.data.name != TEXT and config.client.label_smoothing:
        raise ConfigError(
            f"client.label_smoothing = {config.client.label_smoothing}: only completions of texts "
            f"are smoothed; allowed is 0"
        )
    if config.data.name == TEXT:
        for name, value in (
            ("data.task", config.data.task),
            ("data.train", config.data.train),
            ("model.pretrained", config.model.pretrained),
        ):
            if not value:
                raise ConfigError(f"{name} = '': a language model on text needs it")
    if config.model.attention == "cudnn" and config.client.compute_dtype != "bfloat16":
        raise ConfigError(
            f"model.attention = 'cudnn' with client.compute_dtype = "
            f"{config.client.compute_dtype!r}: allowed is bfloat16"
        )


def _check_fedsp(config: Config) -> None:
    """What does not go with prompts that are tuned on another model than the server's."""
    if config.algorithm != FEDSP:
        return
    if config.model.name != LANGUAGE:
        raise ConfigError(
            f"algorithm = 'fedsp' with model.name = {config.model.name!r}: allowed is {LANGUAGE}, "
            f"with an encoder"
        )
    client, distillation = config.client, config.fedsp.distillation_steps
    refused = {
        f"lora.rank = {config.lora.rank}": (config.lora.rank, "0"),
        f"upload.bits = {config.upload.bits}": (config.upload.bits, "0"),
        "quantize_embeddings = True": (config.quantize_embeddings, "False"),
        f"site_rules = {config.site_rules}": (config.site_rules, "()"),
        f"client.trained = {client.trained}": (client.trained, "(), it trains prompts"),
    }
    for what, (is_set, allowed) in refused.items():
        if is_set:
            raise ConfigError(f"{what} with algorithm = 'fedsp': allowed is {allowed}")
    if not config.fedsp.tuned:
        raise ConfigError(f"fedsp.tuned = (): allowed are one or more of {', '.join(TUNED)}")
    if distillation and not config.data.private_rows:
        raise ConfigError(
            f"fedsp.distillation_steps = {distillation} with data.private_rows = 0: the server "
            f"has no rows to distil on; allowed is 0"
        )


def _check_broadcast(config: Config) -> None:
    """What does not go with sending less than the latest model in every round."""
    broadcast, server = config.broadcast, config.server
    chosen = f"broadcast.every = {broadcast.every}"
    if broadcast.share != 1:
        chosen += f", broadcast.share = {broadcast.share}"
        if broadcast.every == 0:
            raise ConfigError(
                f"{chosen}: nothing that was learned is sent, so no share of it; allowed is "
                f"broadcast.share = 1, or broadcast.every of 1 or more"
            )
    if broadcast == BroadcastConfig():
        return
    if config.algorithm == FEDSP:
        raise ConfigError(
            f"{chosen} with algorithm = 'fedsp', whose prompts have to travel; allowed is "
            f"broadcast.every = 1 with broadcast.share = 1, or another algorithm"
        )
    if server.rule != "delta":
        raise ConfigError(
            f"server.rule = {server.rule!r} with {chosen}: what was sent is not the latest model; "
            f"allowed is server.rule = 'delta', or broadcast.every = 1 with broadcast.share = 1"
        )
    plain = {
        f"server.optimizer = {server.optimizer!r}": server.optimizer == "sgd",
        f"server.learning_rate = {server.learning_rate}": server.learning_rate == 1,
        f"server.momentum = {server.momentum}": server.momentum == 0,
        f"server.decay = {server.decay!r}": server.decay == "none",
    }
    for what, is_plain in plain.items():
        if broadcast.every == 0 and not is_plain:
            raise ConfigError(
                f"{what} with {chosen}: one-way rounds are a running mean; allowed are sgd of rate "
                f"1 without momentum or decay (server.scale sets the size), or broadcast.every of "
                f"1 or more"
            )
    if chooses_scale(config) and not server.validation_rows:
        raise ConfigError(
            "server.scale = 0 with server.validation_rows = 0: there is nothing to choose the "
            "scale on; allowed is server.scale above 0, or rows of data.private_rows"
        )


def chooses_scale(config: Config) -> bool:
    """Whether a run chooses the scale of what it learned itself, on rows of the server."""
    return config.broadcast.every == 0 and config.server.scale == 0


def unknown_field(name: str) -> ConfigError:
    """Returns the error for a dotted field name that does not exist, with the nearest that does."""
    known = [*flatten(Config()), *(field.name for field in dataclasses.fields(Config))]
    near = difflib.get_close_matches(name, known, n=1, cutoff=0.5)
    last = name.rpartition(".")[2]
    near = near or difflib.get_close_matches(last, [k.rpartition(".")[2] for k in known], n=1)
    hint = f"; did you mean {near[0]}?" if near else ""
    return ConfigError(f"unknown field {name}{hint}")


def _resolve_section(section: type, values: Mapping[str, Any], prefix: str) -> Any:
    fields = {field.name: field for field in dataclasses.fields(section)}
    hints = typing.get_type_hints(section)
    resolved = {}
    for name, value in values.items():
        if name not in fields:
            raise unknown_field(prefix + name)
        if dataclasses.is_dataclass(hints[name]):
            if not isinstance(value, Mapping | ml_collections.ConfigDict):
                raise ConfigError(f"{prefix}{name} = {value!r}: it is a section of fields")
            resolved[name] = _resolve_section(hints[name], value, f"{prefix}{name}.")
        else:
            checked = _checked_type(prefix + name, hints[name], value)
            _check_range(prefix + name, checked, fields[name].metadata["allowed"])
            resolved[name] = checked
    return section(**resolved)


def _checked_type(name: str, expected: Any, value: Any) -> Any:
    if isinstance(expected, types.GenericAlias):
        element = typing.get_args(expected)[0]
        if not isinstance(value, list | tuple):
            raise ConfigError(f"{name} = {value!r}: allowed is a sequence of {element.__name__}")
        return tuple(_checked_type(f"{name}[{i}]", element, v) for i, v in enumerate(value))
    if expected is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    if not isinstance(value, expected) or isinstance(value, bool) != (expected is bool):
        raise ConfigError(f"{name} = {value!r}: allowed is a value of type {expected.__name__}")
    return value


def _check_range(name: str, value: Any, allowed: Any) -> None:
    if isinstance(value, tuple):
        for index, element in enumerate(value):
            _check_range(f"{name}[{index}]", element, allowed)
    elif allowed and "one_of" in allowed:
        if value not in allowed["one_of"]:
            raise ConfigError(f"{name} = {value!r}: allowed are {', '.join(allowed['one_of'])}")
    elif allowed:
        low, high, below = allowed["low"], allowed["high"], allowed["below"]
        # Counts are 32-bit integers on the device.
        if isinstance(value, int) and high is None and below is None and value >= 2**31:
            high = 2**31 - 1
        # Written so that NaN is refused.
        if not (
            value >= low and (high is None or value <= high) and (below is None or value < below)
        ):
            upper = f" to {high}" if high is not None else ""
            upper = f" to below {below}" if below is not None else upper
            raise ConfigError(f"{name} = {value!r}: allowed is {low}{upper or ' or more'}")
