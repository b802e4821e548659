"""The parts of a method that a configuration names: algorithm, quantizers, optimizer, adapters."""

import dataclasses
from typing import Any

import optax

from fedqsn_jax.config.schema import Config, ConfigError, ServerConfig, chooses_scale
from fedqsn_jax.core.trees import Selection
from fedqsn_jax.core.types import Params
from fedqsn_jax.protocol.algorithms import Algorithm, make_algorithm
from fedqsn_jax.protocol.broadcast import Broadcast
from fedqsn_jax.protocol.lora import Lora, find_adapters, without_adapters
from fedqsn_jax.protocol.quantization import NormalFloat, Quantizer, SymmetricNormalFloat, Uniform
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.protocol.upload import Upload, quantized_upload, whole_upload
from fedqsn_jax.rounds.aggregation import Aggregator, make_aggregator, make_running_mean
from fedqsn_jax.rounds.poisson import poisson_places
from fedqsn_jax.rounds.privacy import Privacy
from fedqsn_jax.simulation.accounting import Account

_CODEBOOKS: dict[str, type[Quantizer]] = {
    "normal_float": NormalFloat,
    "symmetric_normal_float": SymmetricNormalFloat,
    "uniform": Uniform,
}


def algorithm_of(config: Config) -> Algorithm:
    """Returns the algorithm that a configuration names, with the settings that it uses."""
    algorithm = make_algorithm(
        config.algorithm,
        make_quantizer(config),
        p1=config.p1,
        p2=config.p2,
        sampling=config.sampling,  # type: ignore[arg-type]
    )
    return dataclasses.replace(algorithm, tracing_margin=config.tracing_margin)


def make_quantizer(config: Config) -> Quantizer:
    """Returns the quantizer that a configuration names."""
    kind = _CODEBOOKS[config.codebook]
    return kind(config.bits, config.block_size, blocks_along=config.blocks)


def upload_quantizer(config: Config) -> Quantizer | None:
    """Returns the quantizer of updates that a configuration names, or None."""
    settings = config.upload
    if not settings.bits:
        return None
    return _CODEBOOKS[settings.codebook](settings.bits, settings.block_size)


def make_upload(config: Config, sites: Sites, trained: Selection) -> Upload:
    """Returns the way back of updates that a configuration names.

    Args:
      config: The settings.
      sites: The mask sites.
      trained: The tensors that are trained.

    Raises:
      ConfigError: There is nothing to quantize.
    """
    quantizer = upload_quantizer(config)
    if quantizer is None:
        return whole_upload()
    if not any(site.quantized and (trained is None or site.path in trained) for site in sites):
        raise ConfigError(
            f"upload.bits = {config.upload.bits}: no kernel of a site is trained, or they are "
            f"adapters that are not quantized; allowed is 0, or lora.quantize = True"
        )
    feedback = config.upload.error_feedback
    return quantized_upload(quantizer, sites, feedback=feedback, trained=trained)


def server_optimizer(settings: ServerConfig, rounds: int) -> optax.GradientTransformation:
    """Returns the optimizer of the server; ``rounds`` is how many there are in all."""
    rate: Any = settings.learning_rate
    if settings.decay == "linear":
        rate = optax.linear_schedule(settings.learning_rate, 0.0, max(rounds, 1))
    makers = {
        "sgd": lambda: optax.sgd(rate, settings.momentum or None),
        "adagrad": lambda: optax.adagrad(rate),
        "adam": lambda: optax.adam(rate),
        "yogi": lambda: optax.yogi(rate),
        "lamb": lambda: optax.lamb(rate),
        "adafactor": lambda: optax.adafactor(rate),
    }
    return makers[settings.optimizer]()


SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
"""Scales of the mean delta of one-way rounds among which a run chooses."""


def configured_aggregator(config: Config, sites: Sites, returned: Selection) -> Aggregator:
    """Returns what becomes of the deltas by a configuration.

    Args:
      config: The settings.
      sites: The mask sites.
      returned: The tensors whose deltas travel back.
    """
    server = config.server
    shared: Any = {
        "weighting": server.weighting,
        "normalize": server.normalize,
        "trained": returned,
        # Privacy refuses the other.
        "clip_norm": config.privacy.clip or server.clip_norm,
    }
    if config.broadcast.every == 0:
        scale = 1.0 if chooses_scale(config) else server.scale
        return make_running_mean(sites, scale=scale, **shared)
    rule: Any = server.rule
    return make_aggregator(sites, server_optimizer(server, config.rounds), rule=rule, **shared)


def cohort_places(config: Config, population: int) -> int:
    """Returns the most clients of a round."""
    if config.cohort.sampling == "poisson":
        return poisson_places(population, config.cohort.size)
    return config.cohort.size


def configured_privacy(
    config: Config, algorithm: Algorithm, account: Account | None
) -> Privacy | None:
    """Returns how sums of updates are made private by a configuration, or None.

    Args:
      config: The settings.
      algorithm: What clients receive.
      account: What it costs, with the noise.
    """
    if account is None:
        return None
    return Privacy(
        clip=config.privacy.clip,
        noise=account.noise,
        expected=float(config.cohort.size),
        hidden=algorithm.p2,
        sampling=algorithm.sampling,
    )


def configured_broadcast(config: Config, algorithm: Algorithm) -> Broadcast:
    """Returns what of the hidden model is sent by a configuration."""
    return Broadcast(
        every=config.broadcast.every,
        share=config.broadcast.share,
        # A probability may be traced.
        renewed=config.mask_per == "round" and algorithm.p2 > 0,
    )


def configured_adapters(config: Config, params: Params) -> Lora | None:
    """Finds the adapters that a configuration asks for, in the plain model's parameters.

    Raises:
      ConfigError: A pattern fits no matrix.
    """
    settings = config.lora
    if settings.rank == 0:
        return None
    try:
        return find_adapters(
            params,
            rules=config.site_rules,
            matrices=settings.matrices,
            rank=settings.rank,
            alpha=settings.alpha or float(settings.rank),
        )
    except ValueError as error:
        raise ConfigError(f"lora.matrices: {error}") from error


def merge_configured(config: Config, params: Params) -> Params:
    """Returns the plain model's parameters of a run with this configuration.

    Args:
      config: The run's.
      params: Its parameters, with adapters if it has any.
    """

    lora = configured_adapters(config, without_adapters(params))
    return params if lora is None else lora.merge(params)
