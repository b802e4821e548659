"""How an encoder classifier is described: its settings, and how its tensors are written down."""

import dataclasses
from typing import Any, ClassVar, Self

from fedqsn_jax.models.language.hugging_face import (
    Settings,
    Tensor,
    Unread,
    counts_up,
    embedding,
    layer_norm,
    linear,
    token_ids,
)

POOLINGS = ("cls", "mean")


def weights_and_biases(*layers: str) -> tuple[str, ...]:
    """Names of the tensors of linear layers and norms."""
    return tuple(f"{layer}.{kind}" for layer in layers for kind in ("weight", "bias"))


_HEADS = {
    "bert": (
        *weights_and_biases("pooler.dense", "classifier", "cls.seq_relationship"),
        *weights_and_biases("cls.predictions.decoder", "cls.predictions.transform.dense"),
        *weights_and_biases("cls.predictions.transform.LayerNorm"),
        "cls.predictions.bias",
    ),
    "roberta": (
        *weights_and_biases("pooler.dense", "classifier.dense", "classifier.out_proj"),
        *weights_and_biases("lm_head.decoder", "lm_head.dense", "lm_head.layer_norm"),
        "lm_head.bias",
    ),
}
"""Tensors of the heads of each family, as the transformers library knows them."""

_CLASSES = {"bert": "Bert", "roberta": "Roberta", "xlm-roberta": "XLMRoberta"}
"""How the names of the transformers library's classes begin."""

_OTHER_TASKS = ("ForTokenClassification", "ForMultipleChoice")
OTHER_HEADS = weights_and_biases("classifier")
"""Tensors of heads that classify something else than whole texts."""


@dataclasses.dataclass(frozen=True)
class EncoderConfig:
    """An encoder with a classification head.

    Attributes:
      family: ``bert``, ``roberta`` or ``xlm-roberta``.
      vocab_size: Number of tokens.
      width: Of the hidden states.
      layers: Number of layers.
      heads: Attention heads a layer.
      inner: Width between the MLP's matrices.
      activation: A name in `transformer.ACTIVATIONS`.
      positions: Rows of the position table.
      token_types: Rows of the token-type table; 0: there is none.
      norm_epsilon: Of the layer norms.
      hidden_dropout: Rate after embeddings and in the residual branches.
      attention_dropout: Rate of the attention's probabilities.
      classifier_dropout: Rate in the head.
      stddev: Of initial kernels.
      pad_token_id: The padding's id.
      bos_token_id: The id of the first token, where the file names one.
      eos_token_ids: Ids that end a text, where the file names them.
      classes: Number of logits; 0: no head, the outputs are the pooled hidden states.
      pooling: ``cls``: the first token, through a dense layer with tanh, as the family's own
        classifiers do; ``mean``: the mean over real tokens.
      labels: Names of the classes, in the order of the logits; empty: they have none.
      own_head: Whether a file's ``classifier`` classifies whole texts, so that it is read; one of
        single tokens or of multiple choice is not, and another is drawn.
    """

    family: str
    vocab_size: int
    width: int
    layers: int
    heads: int
    inner: int
    activation: str = "gelu"
    positions: int = 512
    token_types: int = 2
    norm_epsilon: float = 1e-12
    hidden_dropout: float = 0.1
    attention_dropout: float = 0.1
    classifier_dropout: float = 0.1
    stddev: float = 0.02
    pad_token_id: int | None = 0
    bos_token_id: int | None = None
    eos_token_ids: tuple[int, ...] = ()
    classes: int = 2
    pooling: str = "cls"
    labels: tuple[str, ...] = ()
    own_head: bool = True

    FAMILIES: ClassVar[tuple[str, ...]] = ("bert", "roberta", "xlm-roberta")

    head_activation: ClassVar[str] = "tanh"
    """Between the two layers of the family's head; a name in `transformer.ACTIVATIONS`."""

    def __post_init__(self) -> None:
        if self.pooling not in POOLINGS:
            raise ValueError(f"pooling = {self.pooling!r}: allowed are {', '.join(POOLINGS)}")
        if self.width % self.heads:
            raise ValueError(f"width {self.width} is no multiple of {self.heads} heads")

    @property
    def is_roberta(self) -> bool:
        """Whether this is a RoBERTa; XLM-R (arXiv 1911.02116) is one, of many languages."""
        return self.family in ("roberta", "xlm-roberta")

    @property
    def first_position(self) -> int:
        """Where real tokens' positions begin: RoBERTa's follow the padding's id."""
        return (self.pad_token_id or 0) + 1 if self.is_roberta else 0

    @property
    def max_length(self) -> int:
        """The longest sequence."""
        return self.positions - self.first_position

    @property
    def prefix(self) -> str:
        """What names of tensors begin with, where the file has a head."""
        return "roberta." if self.is_roberta else "bert."

    @property
    def ignored(self) -> tuple[Unread, ...]:
        """Tensors that a file may hold and that are not read.

        These are parts of a classification head that another pooling does without, and the heads
        of pre-training.
        """
        positions = Unread("embeddings.position_ids", "0, 1, 2 and so on", counts_up)
        heads = [
            *_HEADS["roberta" if self.is_roberta else "bert"],
            *(() if self.own_head else OTHER_HEADS),
        ]
        return (positions, *[Unread(name) for name in heads])

    @property
    def architecture(self) -> str:
        """The transformers library's class that reads what is written."""
        name = _CLASSES[self.family]
        whole = self.classes and self.pooling == "cls"
        return name + ("ForSequenceClassification" if whole else "Model")

    @property
    def unread(self) -> tuple[str, ...]:
        """Names of written tensors that this class has no place for: a classifier of means."""
        if self.architecture.endswith("ForSequenceClassification"):
            return ()
        return tuple(each.name for each in self.tensors() if each.path.startswith("classifier/"))

    def with_dropout(self, rate: float) -> Self:
        """Returns the same with one dropout rate everywhere."""
        return dataclasses.replace(
            self, hidden_dropout=rate, attention_dropout=rate, classifier_dropout=rate
        )

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings.require("position_embedding_type", "absolute")
        settings.require("is_decoder", False)
        settings.require("add_cross_attention", False)
        hidden_dropout = settings.rate("hidden_dropout_prob", 0.1)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size"),
            width=settings.integer("hidden_size"),
            layers=settings.integer("num_hidden_layers"),
            heads=settings.integer("num_attention_heads"),
            inner=settings.integer("intermediate_size"),
            activation=settings.activation("hidden_act", "gelu"),
            positions=settings.integer("max_position_embeddings"),
            token_types=settings.integer("type_vocab_size", 2),
            norm_epsilon=settings.number("layer_norm_eps", 1e-12),
            hidden_dropout=hidden_dropout,
            attention_dropout=settings.rate("attention_probs_dropout_prob", 0.1),
            classifier_dropout=settings.rate("classifier_dropout", hidden_dropout),
            stddev=settings.number("initializer_range", 0.02),
            pad_token_id=settings.token("pad_token_id", 0 if family == "bert" else 1),
            bos_token_id=settings.token("bos_token_id"),
            eos_token_ids=settings.tokens("eos_token_id"),
            **read_classes(settings),
        )

    def to_settings(self) -> dict[str, Any]:
        """Returns what config.json holds."""
        return names_of_classes(self.labels, self.classes) | {
            "architectures": [self.architecture],
            "model_type": self.family,
            "vocab_size": self.vocab_size,
            "hidden_size": self.width,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "intermediate_size": self.inner,
            "hidden_act": self.activation,
            "max_position_embeddings": self.positions,
            "type_vocab_size": self.token_types,
            "layer_norm_eps": self.norm_epsilon,
            "hidden_dropout_prob": self.hidden_dropout,
            "attention_probs_dropout_prob": self.attention_dropout,
            "classifier_dropout": self.classifier_dropout,
            "initializer_range": self.stddev,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
            "pooling": self.pooling,
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}encoder.layer.{{}}.", "layers"
        found = [
            embedding("token_embed", f"{base}embeddings.word_embeddings"),
            embedding("position_embed", f"{base}embeddings.position_embeddings"),
            embedding("type_embed", f"{base}embeddings.token_type_embeddings"),
            *layer_norm("embed_norm", f"{base}embeddings.LayerNorm"),
            *linear(f"{ours}/attention/query", f"{layer}attention.self.query"),
            *linear(f"{ours}/attention/key", f"{layer}attention.self.key"),
            *linear(f"{ours}/attention/value", f"{layer}attention.self.value"),
            *linear(f"{ours}/attention/out", f"{layer}attention.output.dense", inputs=2),
            *layer_norm(f"{ours}/attention_norm", f"{layer}attention.output.LayerNorm"),
            *linear(f"{ours}/mlp/up", f"{layer}intermediate.dense"),
            *linear(f"{ours}/mlp/down", f"{layer}output.dense"),
            *layer_norm(f"{ours}/mlp_norm", f"{layer}output.LayerNorm"),
        ]
        if not self.classes:
            return found
        roberta = self.is_roberta
        if self.pooling == "cls":
            dense = "classifier.dense" if roberta else f"{base}pooler.dense"
            found += linear("classifier/dense", dense, drawn=True)
        out = "classifier.out_proj" if roberta else "classifier"
        return found + linear("classifier/out", out, drawn=True)


def names_of_classes(labels: tuple[str, ...], classes: int) -> dict[str, Any]:
    """Returns what config.json says of the classes' names; empty without classes."""
    named = labels if len(labels) == classes else _numbered(classes)
    names = {str(index): name for index, name in enumerate(named)}
    if not names:
        return {}
    return {"id2label": names, "label2id": {name: int(index) for index, name in names.items()}}


def read_classes(settings: Settings) -> dict[str, Any]:
    """Returns the fields of `EncoderConfig` that are about the head.

    Raises:
      PretrainedError: Settings contradict each other.
    """
    labels = len(settings.section("id2label"))
    if labels:
        settings.agree("num_labels", labels)
    return {
        "classes": labels or settings.integer("num_labels", 2),
        "pooling": settings.choice("pooling", "cls", *POOLINGS),
        "labels": _names_of(settings.section("id2label")),
        "own_head": not any(
            name.endswith(_OTHER_TASKS) for name in settings.texts("architectures")
        ),
    }


def _numbered(classes: int) -> tuple[str, ...]:
    """The names that the transformers library gives to classes without names."""
    return tuple(f"LABEL_{index}" for index in range(classes))


def _names_of(id2label: dict[str, Any]) -> tuple[str, ...]:
    """Names of classes in the order of their numbers; empty where they are none of their own."""
    names = tuple(id2label.get(str(index)) for index in range(len(id2label)))
    texts = tuple(name for name in names if isinstance(name, str))
    return texts if texts == names and names != _numbered(len(names)) else ()
