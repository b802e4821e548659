"""What both ends know: the public plan of a federation, as JSON.

It holds the structure of payloads (which columns exist, not which are hidden), the model's name and
sizes, and how a client trains. It holds no seed, no key, no mask, no weight and no row, and nothing
of how the server trains, evaluates or keeps its own.
"""

import dataclasses
import json
from collections.abc import Mapping
from typing import Any

import jax

from fedqsn_jax.config.choices import TEXT
from fedqsn_jax.config.schema import Config, flatten, resolve
from fedqsn_jax.core.json_text import parse_json
from fedqsn_jax.core.types import Params
from fedqsn_jax.protocol.layout import Layout, TensorLayout
from fedqsn_jax.protocol.quantization import NormalFloat, Quantizer, SymmetricNormalFloat, Uniform
from fedqsn_jax.protocol.sites import MaskSite, Sites
from fedqsn_jax.protocol.wire import VERSION

PUBLIC_SETTINGS = ("model.", "client.", "lora.", "upload.", "sites", "site_rules", "algorithm")
"""Fields, or beginnings of fields, that a client needs; all others stay with the server."""

_PRIVATE_SETTINGS = ("model.pretrained",)
"""Of those what stays with the server all the same: where the hidden model lies."""

_QUANTIZERS: dict[str, type[Quantizer]] = {
    kind.__name__: kind for kind in (NormalFloat, SymmetricNormalFloat, Uniform)
}


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a client is told of the federation; the same for all clients and rounds.

    Attributes:
      settings: Values of `PUBLIC_SETTINGS` by their dotted names.
      classes: Number of the model's outputs.
      rows: Shape of a row and dtype of each array that a client's rows have.
      layout: The structure of payloads, without the tree (see `layout_of`).
      version: Of the wire format.
      language: Of a language model its family, sizes, format of texts and tokenizer's digest (see
        `texts`); None: another model.
    """

    settings: dict[str, Any]
    classes: int
    rows: dict[str, tuple[tuple[int, ...], str]]
    layout: dict[str, Any]
    version: int = VERSION
    language: dict[str, Any] | None = None

    def config(self) -> Config:
        """Returns a configuration with the public settings, and defaults for all others."""
        nested: dict[str, Any] = {}
        for name, value in self.settings.items():
            *sections, field = name.split(".")
            branch = nested
            for section in sections:
                branch = branch.setdefault(section, {})
            branch[field] = tuple(value) if isinstance(value, list) else value
        if self.language is not None:
            # What goes with such a model; whose texts they are is no part of a plan.
            nested["model"]["pretrained"] = "own"
            nested["data"] = {"name": TEXT, "task": self.language["text"]["task"], "train": "own"}
        return resolve(nested)

    def encode(self) -> str:
        """Returns the plan as JSON."""
        return json.dumps(dataclasses.asdict(self), sort_keys=True)

    @classmethod
    def decode(cls, text: str) -> "Plan":
        """Inverts `encode`.

        Raises:
          ValueError: It is no plan, or one of another version of the wire format.
        """
        try:
            values = parse_json(text)
        except ValueError as error:
            raise ValueError(f"what the server sent is no plan: {error}") from error
        try:
            version = values["version"]
            if version != VERSION:
                raise ValueError(
                    f"the server speaks version {version} of the wire format, this client version "
                    f"{VERSION}: install the same fedqsn_jax on both"
                )
            rows = {
                name: (tuple(shape), str(dtype)) for name, (shape, dtype) in values["rows"].items()
            }
            return cls(
                values["settings"],
                int(values["classes"]),
                rows,
                values["layout"],
                language=values.get("language"),
            )
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"what the server sent is no plan: {error!r}") from error


def make_plan(
    config: Config,
    layout: Layout,
    classes: int,
    rows: Mapping[str, jax.ShapeDtypeStruct],
    language: dict[str, Any] | None = None,
) -> Plan:
    """Makes the plan of a federation.

    Args:
      config: The server's configuration; what is not public is left out.
      layout: The structure of its payloads.
      classes: Number of the model's outputs.
      rows: Shapes and dtypes of one row.
      language: See `Plan.language`.
    """
    settings = {
        name: value
        for name, value in flatten(config).items()
        if name.startswith(PUBLIC_SETTINGS) and name not in _PRIVATE_SETTINGS
    }
    shapes = {name: (tuple(row.shape), str(row.dtype)) for name, row in rows.items()}
    return Plan(settings, classes, shapes, _describe(layout), language=language)


def _describe(layout: Layout) -> dict[str, Any]:
    return {
        "tensors": [
            {
                "path": tensor.path,
                "shape": tensor.shape,
                "dtype": tensor.dtype,
                "site": None if tensor.site is None else tensor.site.path,
                "is_bias": tensor.is_bias,
                "quantizer": _describe_quantizer(tensor.quantizer),
            }
            for tensor in layout.tensors
        ],
        "masked": layout.masked,
        "scaled": layout.scaled,
        "sites": [dataclasses.asdict(site) for site in layout.sites],
        "trained": None if layout.trained is None else sorted(layout.trained),
        "upload": _describe_quantizer(layout.upload),
    }


def layout_of(plan: Plan, params: Params) -> Layout:
    """Returns the structure of payloads.

    Args:
      plan: What the server says of it.
      params: The parameters' shapes as the client's own model has them.

    Raises:
      ValueError: The model's tensors are not those of the plan.
    """
    told = plan.layout
    sites = Sites(
        MaskSite(**{name: _tuples(value) for name, value in site.items()}) for site in told["sites"]
    )
    by_path = {site.path: site for site in sites}
    tensors = tuple(
        TensorLayout(
            path=each["path"],
            shape=tuple(each["shape"]),
            dtype=each["dtype"],
            site=None if each["site"] is None else by_path[each["site"]],
            is_bias=each["is_bias"],
            quantizer=_quantizer(each["quantizer"]),
        )
        for each in told["tensors"]
    )
    shapes = {tensor.path: tensor.shape for tensor in tensors}

    def travels(key_path: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")
        if path in shapes and tuple(leaf.shape) != shapes.pop(path):
            raise ValueError(f"{path!r} has another shape here than at the server")
        return leaf if any(path == tensor.path for tensor in tensors) else None

    structure = jax.tree.structure(jax.tree_util.tree_map_with_path(travels, params))
    if shapes:
        raise ValueError(f"the model here has no tensor {min(shapes)!r}, which the server sends")
    trained = told["trained"]
    return Layout(
        tensors=tensors,
        masked=tuple(told["masked"]),
        scaled=tuple(told["scaled"]),
        sites=sites,
        structure=structure,
        trained=None if trained is None else frozenset(trained),
        upload=_quantizer(told["upload"]),
    )


def _describe_quantizer(quantizer: Quantizer | None) -> dict[str, Any] | None:
    if quantizer is None:
        return None
    return {"kind": type(quantizer).__name__, **dataclasses.asdict(quantizer)}


def _quantizer(told: Mapping[str, Any] | None) -> Quantizer | None:
    if told is None:
        return None
    fields = dict(told)
    kind = fields.pop("kind")
    if kind not in _QUANTIZERS:
        raise ValueError(f"quantizer {kind!r} is not known here")
    return _QUANTIZERS[kind](**fields)


def _tuples(value: Any) -> Any:
    return tuple(value) if isinstance(value, list) else value
