"""The settings of data, model and training: sections of `settings.Config`, a line a field."""

import dataclasses

from fedqsn_jax.config.choices import (
    ATTENTIONS,
    CLASSIFICATION,
    COMPUTE_DTYPES,
    DATA_SETS,
    LANGUAGE,
    MODELS,
    OPTIMIZERS,
    PARTITIONS,
    POOLINGS,
    RESIDENCES,
    SCHEDULES,
    STEMS,
    TEXT,
)
from fedqsn_jax.config.fields import between, both, field, one_of, unless, when

STEPS = between(0, 10_000_000)
"""Of rounds and of steps: more would not end."""
LAYERS = between(1, entries=100)

_DIRICHLET, _SHARDS = when(".partition", "dirichlet"), when(".partition", "shards")
_SGD, _ADAMW = when(".optimizer", "sgd"), when(".optimizer", "adamw")
_LINEAR = unless(".schedule", "constant")
_TEXTS = when("data.name", TEXT)
_PREPARED, _WHOLE = unless("data.name", "digits"), when("data.name", "digits", TEXT)
_WRITTEN = both(_TEXTS, unless("data.task", *CLASSIFICATION), when("data.labels", ()))
_LANGUAGE = when("model.name", LANGUAGE)
_MLP, _CNN = when("model.name", "mlp"), when("model.name", "cnn")
_RESNET = when("model.name", "resnet18")


@dataclasses.dataclass(frozen=True)
class DataConfig:
    """Which data, and how it is divided among server and clients."""

    name: str = field("digits", one_of(*DATA_SETS), "data set")
    directory: str = field("", None, "where TFDS data sets lie; empty: TFDS's default", _PREPARED)
    clients: int = field(20, between(1), "number of clients", unless(".partition", "natural"))
    partition: str = field("dirichlet", one_of(*PARTITIONS), "how rows are dealt to clients")
    alpha: float = field(
        0.5, between(1e-6), "concentration of the Dirichlet label skew", _DIRICHLET
    )
    shards_per_client: int = field(2, between(1), "label-sorted shards a client", _SHARDS)
    private_rows: int = field(200, between(0), "rows that the server keeps to pre-train on")
    train_rows: int = field(0, between(0), "rows for server and clients together; 0: all")
    test_rows: int = field(
        360, between(1), "rows held out for testing, where there is no split", _WHOLE
    )
    held_out_share: float = field(
        0.0,
        between(0, below=1),
        "share of a client's rows that is kept to test every view on that client",
    )
    held_out_clients: int = field(
        0, between(0), "clients, of those dealt, that never take part: every view is tested on them"
    )
    resident: str = field(
        "auto",
        one_of(*RESIDENCES),
        "where clients' rows live between rounds; `auto`: on the device if they take at most "
        "half of its memory, otherwise on the host, from which those of the next call are "
        "sent while the device works",
    )
    # Of texts, name = "text"; see `data.text.loading.TextSettings`.
    task: str = field(
        "", None, "a task of the package, or own: the columns are named by the fields below", _TEXTS
    )
    train: str = field(
        "",
        None,
        "source of rows: tsv:FILE, jsonl:FILE, e2e:FILE, tfds:NAME, hf:NAME or shakespeare:train",
        _TEXTS,
    )
    test: str = field(
        "",
        None,
        "source of test rows; empty: the train source's test split, else test_rows",
        _TEXTS,
    )
    client_column: str = field(
        "client_id", None, "column that says whose a row is, for partition=natural", _TEXTS
    )
    columns: tuple[str, ...] = field((), None, "input columns, where not the task's", _TEXTS)
    target: str = field("", None, "column of label or completion, where not the task's", _TEXTS)
    labels: tuple[str, ...] = field(
        (), None, "names of the labels; with own: classification", _TEXTS
    )
    template: str = field("", None, "prompt of an own task, with {columns}", _WRITTEN)
    length: int = field(0, between(0), "tokens a row; 0: the task's", _TEXTS)
    target_length: int = field(
        0, between(0), "tokens of an encoder-decoder's target; 0: length", _WRITTEN
    )
    truncate: bool = field(True, None, "whether longer rows are cut; else they are refused", _TEXTS)
    separator: bool = field(True, None, "whether end-of-text ends a decoder's prompt", _WRITTEN)
    cache: str = field("", None, "directory of tokenized rows; empty: the user's cache", _TEXTS)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """The model."""

    name: str = field("mlp", one_of(*MODELS), "architecture")
    hidden: tuple[int, ...] = field((256, 256), LAYERS, "widths of the hidden layers", _MLP)
    channels: tuple[int, ...] = field((32, 64), LAYERS, "channels of the convolutions", _CNN)
    dense: int = field(128, between(1), "width of the hidden dense layer", _CNN)
    width: int = field(64, between(1), "channels of the first stage", _RESNET)
    stem: str = field("cifar", one_of(*STEMS), "the stem: 3x3, or 7x7 and pooling", _RESNET)
    pretrained: str = field("", None, "a directory, or a name on the Hugging Face hub", _LANGUAGE)
    pooling: str = field(
        "auto", one_of(*POOLINGS), "of encoders; auto: the family's, cls", _LANGUAGE
    )
    attention: str = field("auto", one_of(*ATTENTIONS), "kernel of attention", _LANGUAGE)
    unroll: int = field(1, between(1), "layers in a step of the scan over layers", _LANGUAGE)
    dtype: str = field(
        "float32",
        one_of(*COMPUTE_DTYPES),
        "of the tensors that nobody trains; trained ones are float32",
        _LANGUAGE,
    )
    remat: bool = field(
        False, None, "whether activations are computed again going backward", _LANGUAGE
    )


@dataclasses.dataclass(frozen=True)
class TrainingConfig:
    """Training by gradients: what the server's own and the clients' have in common."""

    steps: int = field(0, STEPS, "steps")
    batch_size: int = field(32, between(1), "rows a step")
    optimizer: str = field("sgd", one_of(*OPTIMIZERS), "optimizer")
    learning_rate: float = field(0.1, between(0), "rate; with schedule=linear its peak")
    momentum: float = field(0.0, between(0, below=1), "momentum", _SGD)
    weight_decay: float = field(0.0, between(0), "decoupled weight decay", _ADAMW)
    schedule: str = field("constant", one_of(*SCHEDULES), "rate over the steps; linear: falls")
    warmup: float = field(
        0.06, between(0, 1), "share of the steps in which the rate rises", _LINEAR
    )
    accumulate: int = field(1, between(1), "steps whose gradients make one update")
    clip_norm: float = field(0.0, between(0), "largest norm of an update's gradient; 0: any")
    dropout: float = field(0.0, between(0, below=1), "dropout in hidden layers")


@dataclasses.dataclass(frozen=True)
class PretrainingConfig(TrainingConfig):
    """The server's own training on its private rows, before the first round."""

    steps: int = field(400, STEPS, "steps; 0: start from what the model is")
    batch_size: int = field(64, between(1), "rows a step")
    rows: int = field(
        0, between(0), "of the private rows, the first so many, which are labelled; 0: all"
    )
