"""DistilBERT (arXiv 1910.01108): a BERT without token types, written down under other names."""

import dataclasses
from typing import Any, ClassVar, Self

from fedqsn_jax.models.language.encoder_config import (
    OTHER_HEADS,
    EncoderConfig,
    names_of_classes,
    read_classes,
    weights_and_biases,
)
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

_NAMES = {"hidden_size": "dim", "num_attention_heads": "n_heads", "num_hidden_layers": "n_layers"}
"""Names by which the transformers library knows the settings too."""

_HEADS = weights_and_biases("pre_classifier", "classifier", "vocab_transform", "vocab_layer_norm")
_HEADS += weights_and_biases("vocab_projector")


@dataclasses.dataclass(frozen=True)
class DistilBertConfig(EncoderConfig):
    """A DistilBERT; the fields are those of `EncoderConfig`."""

    token_types: int = 0

    FAMILIES: ClassVar[tuple[str, ...]] = ("distilbert",)

    head_activation: ClassVar[str] = "relu"
    """Between the two layers of the family's head."""

    @property
    def prefix(self) -> str:
        """What names of tensors begin with, where the file has a head."""
        return "distilbert."

    @property
    def ignored(self) -> tuple[Unread, ...]:
        """Tensors that a file may hold and that are not read."""
        positions = Unread("embeddings.position_ids", "0, 1, 2 and so on", counts_up)
        heads = [*_HEADS, *(() if self.own_head else OTHER_HEADS)]
        return (positions, *[Unread(name) for name in heads])

    @property
    def architecture(self) -> str:
        """The transformers library's class that reads what is written."""
        whole = self.classes and self.pooling == "cls"
        return "DistilBertForSequenceClassification" if whole else "DistilBertModel"

    @classmethod
    def from_settings(cls, family: str, settings: Settings) -> Self:
        """Reads a config.json."""
        settings = settings.in_current_names(_NAMES)
        dropout = settings.rate("dropout", 0.1)
        # Sinusoidal tables are stored like learned ones.
        settings.flag("sinusoidal_pos_embds", False)
        return cls(
            family=family,
            vocab_size=settings.integer("vocab_size", 30522),
            width=settings.integer("dim", 768),
            layers=settings.integer("n_layers", 6),
            heads=settings.integer("n_heads", 12),
            inner=settings.integer("hidden_dim", 3072),
            activation=settings.activation("activation", "gelu"),
            positions=settings.integer("max_position_embeddings", 512),
            hidden_dropout=dropout,
            attention_dropout=settings.rate("attention_dropout", 0.1),
            classifier_dropout=settings.rate("seq_classif_dropout", 0.2),
            stddev=settings.number("initializer_range", 0.02),
            pad_token_id=settings.token("pad_token_id", 0),
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
            "dim": self.width,
            "n_layers": self.layers,
            "n_heads": self.heads,
            "hidden_dim": self.inner,
            "activation": self.activation,
            "max_position_embeddings": self.positions,
            "dropout": self.hidden_dropout,
            "attention_dropout": self.attention_dropout,
            "seq_classif_dropout": self.classifier_dropout,
            "initializer_range": self.stddev,
            "pad_token_id": self.pad_token_id,
            "bos_token_id": self.bos_token_id,
            "eos_token_id": token_ids(self.eos_token_ids),
            "pooling": self.pooling,
        }

    def tensors(self) -> list[Tensor]:
        """Returns how every tensor is written down."""
        base, layer, ours = self.prefix, f"{self.prefix}transformer.layer.{{}}.", "layers"
        found = [
            embedding("token_embed", f"{base}embeddings.word_embeddings"),
            embedding("position_embed", f"{base}embeddings.position_embeddings"),
            *layer_norm("embed_norm", f"{base}embeddings.LayerNorm"),
            *linear(f"{ours}/attention/query", f"{layer}attention.q_lin"),
            *linear(f"{ours}/attention/key", f"{layer}attention.k_lin"),
            *linear(f"{ours}/attention/value", f"{layer}attention.v_lin"),
            *linear(f"{ours}/attention/out", f"{layer}attention.out_lin", inputs=2),
            *layer_norm(f"{ours}/attention_norm", f"{layer}sa_layer_norm"),
            *linear(f"{ours}/mlp/up", f"{layer}ffn.lin1"),
            *linear(f"{ours}/mlp/down", f"{layer}ffn.lin2"),
            *layer_norm(f"{ours}/mlp_norm", f"{layer}output_layer_norm"),
        ]
        if not self.classes:
            return found
        if self.pooling == "cls":
            found += linear("classifier/dense", "pre_classifier", drawn=True)
        return found + linear("classifier/out", "classifier", drawn=True)
