"""Fields of a configuration that what it chooses elsewhere leaves without effect."""

from collections.abc import Collection

from fedqsn_jax.config.schema import LANGUAGE, TEXT, Config, chooses_scale, flatten, with_fields
from fedqsn_jax.simulation.from_config import algorithm_of

_MASKED = ("sampling",)
_QUANTIZED = ("bits", "block_size", "codebook", "blocks")
_UPLOAD = ("upload.block_size", "upload.codebook")
_STRAGGLERS = ("participation.straggler_share",)
_ADAPTERS = ("lora.alpha", "lora.matrices", "lora.quantize")
_STEPS, _EPOCHS = "client.steps", "client.epochs"
_PROMPTED = tuple(name for name in flatten(Config()) if name.startswith("fedsp."))
_AUXILIARY = ("fedsp.auxiliary_rate",)
_DISTILLED = ("fedsp.distillation_rate", "fedsp.distillation_noise", "fedsp.temperature")
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
    """Returns the dotted names of fields whose values make no difference to a run.

    Without ``p1`` and ``p2``, which an algorithm without masks has as zero.
    """
    return tuple(name for name, _ in (*_of_method(config), *_of_problem(config)))


def without_effect(config: Config) -> set[str]:
    """Returns `unused_fields`, with ``p1`` and ``p2`` of an algorithm without masks.

    Each is so whatever the values of the others in the set.
    """
    return {name for name, _ in _probabilities(config)} | set(unused_fields(config))


def as_used(config: Config) -> Config:
    """Returns a configuration with what it does not use at defaults, ``p1`` and ``p2`` at zero.

    Of two that differ in nothing else these are equal.
    """
    algorithm, defaults = algorithm_of(config), flatten(Config())
    values = {"p1": algorithm.p1, "p2": algorithm.p2}
    values |= {name: defaults[name] for name in unused_fields(config)}
    return with_fields(config, values)


def ignored_settings(config: Config, chosen: Collection[str] = ()) -> list[str]:
    """Returns a line for each setting that was made and has no effect.

    Args:
      config: The settings.
      chosen: Dotted names of the fields that the user set one by one. Of settings of the method
        only those are told: files under ``configs/`` make them for all algorithms, of which one is
        then chosen. A file's epochs are told beside its own steps, not beside chosen ones.
    """
    fields, defaults = flatten(config), flatten(Config())
    of_method = [*_probabilities(config), *_of_method(config)]
    told = [
        (name, why)
        for name, why in of_method
        if name in chosen or (name == _EPOCHS and _STEPS not in chosen)
    ]
    return [
        f"{name} = {fields[name]!r} has no effect with {why}"
        for name, why in (*told, *_of_problem(config))
        if fields[name] != defaults[name]
    ]


def _probabilities(config: Config) -> list[tuple[str, str]]:
    """The probabilities, where the algorithm hides nothing whatever they are."""
    likely = algorithm_of(with_fields(config, {"p1": 0.5, "p2": 0.5}))
    why = f"algorithm = {config.algorithm!r}"
    return [] if likely.p1 else [("p1", why), ("p2", why)]


def _of_method(config: Config) -> list[tuple[str, str]]:
    """Unused fields of the method, each with the setting that leaves it unused."""
    algorithm = algorithm_of(config)
    by_algorithm = f"algorithm = {config.algorithm!r}"
    prompts, fedsp = algorithm.prompts_only, config.fedsp
    masked = bool(algorithm.p1 or algorithm.p2)
    no_masks = by_algorithm if _probabilities(config) else "p1 = 0 and p2 = 0"
    # What is neither hidden nor quantized, there or back, is the same whatever could be; adapters
    # have sites of their own, with a model that is public the only ones.
    at_sites = masked or algorithm.quantizer is not None or config.upload.bits > 0
    needs = [
        (("sites",), at_sites and not algorithm.adapters_only, no_masks),
        (_MASKED, masked, no_masks),
        (_QUANTIZED, algorithm.quantizer, by_algorithm),
        (_PROMPTED, prompts, by_algorithm),
        (
            _AUXILIARY,
            not prompts or fedsp.auxiliary_share > 0,
            f"fedsp.auxiliary_share = {fedsp.auxiliary_share}",
        ),
        (_DISTILLED, not prompts or fedsp.distillation_steps, "fedsp.distillation_steps = 0"),
        (_UPLOAD, config.upload.bits, "upload.bits = 0"),
        (_ADAPTERS, config.lora.rank, "lora.rank = 0"),
        (_STRAGGLERS, config.participation.stragglers, "participation.stragglers = 0"),
        ((_EPOCHS,), not config.client.steps, f"{_STEPS} = {config.client.steps}"),
        (("mask_per",), algorithm.p2, by_algorithm if _probabilities(config) else "p2 = 0"),
        (
            ("server.scale",),
            config.broadcast.every == 0,
            f"broadcast.every = {config.broadcast.every}",
        ),
        (
            ("server.validation_rows",),
            chooses_scale(config),
            f"broadcast.every = {config.broadcast.every}"
            if config.broadcast.every
            else f"server.scale = {config.server.scale}",
        ),
    ]
    needs += _of_optimizers(config)
    return [(name, why) for names, used, why in needs if not used for name in names]


def _of_optimizers(config: Config) -> list[tuple[tuple[str, ...], bool, str]]:
    """Settings that some optimizers have, whether they do here, and the setting that decides it."""
    needs = []
    for section, training in (("client", config.client), ("pretraining", config.pretraining)):
        name, schedule = training.optimizer, training.schedule
        by_name = f"{section}.optimizer = {name!r}"
        needs += [
            ((f"{section}.momentum",), name == "sgd", by_name),
            ((f"{section}.weight_decay",), name == "adamw", by_name),
            ((f"{section}.warmup",), schedule != "constant", f"{section}.schedule = {schedule!r}"),
        ]
    name = config.server.optimizer
    return [*needs, (("server.momentum",), name == "sgd", f"server.optimizer = {name!r}")]


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
