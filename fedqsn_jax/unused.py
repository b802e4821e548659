"""Fields of a configuration that what it chooses elsewhere leaves without effect."""

from fedqsn_jax.config import LANGUAGE, TEXT, Config, flatten
from fedqsn_jax.configured import algorithm_of

_MASKED = ("sampling",)
_QUANTIZED = ("bits", "block_size", "codebook", "blocks")
_UPLOAD = ("upload.block_size", "upload.codebook")
_STRAGGLERS = ("participation.straggler_share",)
_PROMPTED = tuple(name for name in flatten(Config()) if name.startswith("fedsp."))
_OF_MODELS = {
    "mlp": ("model.hidden",),
    "cnn": ("model.channels", "model.dense"),
    "resnet18": ("model.width", "model.stem"),
    LANGUAGE: tuple(
        f"model.{name}" for name in ("pretrained", "pooling", "attention", "unroll", "remat")
    ),
}
_OF_PARTITIONS = {"dirichlet": ("data.alpha",), "shards": ("data.shards_per_client",)}
_TEXTS = ("task", "train", "test", "columns", "target", "labels", "template", "length")
_OF_TEXTS = tuple(
    f"data.{name}" for name in (*_TEXTS, "target_length", "truncate", "separator", "cache")
)


def unused_fields(config: Config) -> tuple[str, ...]:
    """Returns the dotted names of fields whose values make no difference to a run."""
    algorithm = algorithm_of(config)
    needs = (
        (_MASKED, algorithm.p1 or algorithm.p2),
        (_QUANTIZED, algorithm.quantizer),
        (_UPLOAD, config.upload.bits),
        (_STRAGGLERS, config.participation.stragglers),
        (_PROMPTED, algorithm.prompts_only),
    )
    of_method = [name for names, by in needs if not by for name in names]
    return (*of_method, *(name for name, _ in _of_problem(config)))


def ignored_settings(config: Config) -> list[str]:
    """Returns a line for each setting of data or model that was made and has no effect.

    Settings of the method are left out: files under ``configs/`` make them for all algorithms, of
    which one is then chosen.
    """
    fields, defaults = flatten(config), flatten(Config())
    return [
        f"{name} = {fields[name]!r} has no effect with {why}"
        for name, why in _of_problem(config)
        if fields[name] != defaults[name]
    ]


def _of_problem(config: Config) -> list[tuple[str, str]]:
    """Unused fields of data and model, each with the setting that leaves it unused."""
    unused = [
        (name, f"{setting} = {chosen!r}")
        for setting, chosen, table in (
            ("model.name", config.model.name, _OF_MODELS),
            ("data.partition", config.data.partition, _OF_PARTITIONS),
        )
        for owner, names in table.items()
        if owner != chosen
        for name in names
    ]
    if config.data.name != TEXT:
        unused += [(name, f"data.name = {config.data.name!r}") for name in _OF_TEXTS]
    return unused
