"""What of a configuration fits together: settings that are allowed alone, and not beside others."""

import numpy as np

from fedqsn_jax.config.choices import FEDSP, LANGUAGE, TEXT, TUNED
from fedqsn_jax.config.fields import ConfigError
from fedqsn_jax.config.settings import BroadcastConfig, Config, chooses_scale


def check_together(config: Config) -> None:
    """Checks that the fields of a configuration go with each other.

    Args:
      config: The configuration, whose fields have been checked one by one.

    Raises:
      ConfigError: They do not.
    """
    for name in ("p1", "p2"):
        if np.float32(getattr(config, name)) >= 1:
            raise ConfigError(
                f"{name} = {getattr(config, name)!r}: allowed is 0 to below 1, float32"
            )
    _check_language(config)
    _check_fedsp(config)
    _check_broadcast(config)
    _check_privacy(config)
    _check_tracing(config)
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
    _check_narrow(config)
    if config.model.attention == "cudnn" and config.client.compute_dtype != "bfloat16":
        raise ConfigError(
            f"model.attention = 'cudnn' with client.compute_dtype = "
            f"{config.client.compute_dtype!r}: allowed is bfloat16"
        )


def _check_narrow(config: Config) -> None:
    """What would train tensors that are stored narrow."""
    if config.model.dtype == "float32":
        return
    client, told = config.client, f"model.dtype = {config.model.dtype!r}"
    trains_all = not config.lora.rank and client.trained in ((), ("all",))
    for what, is_set in {
        f"pretraining.steps = {config.pretraining.steps}": config.pretraining.steps > 0,
        f"algorithm = {config.algorithm!r}": config.algorithm == FEDSP,
        f"evaluation.fine_tuned_attackers = {config.evaluation.fine_tuned_attackers}": (
            config.evaluation.fine_tuned_attackers > 0
        ),
        f"lora.rank = 0 and client.trained = {client.trained}": trains_all,
    }.items():
        if is_set:
            raise ConfigError(f"{told} with {what}: all tensors are trained; allowed is float32")


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
    if broadcast == BroadcastConfig():
        return
    if broadcast.every == 0 and broadcast.share != 1:
        raise ConfigError(
            f"{chosen}: nothing that was learned is sent, so no share of it; allowed is "
            f"broadcast.share = 1, or broadcast.every of 1 or more"
        )
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
    if broadcast.every == 0:
        _check_one_way(config, chosen)


def _check_privacy(config: Config) -> None:
    """What noise is made of, and what would let divisors or sums depend on clients' rows."""
    privacy, server = config.privacy, config.server
    given = [
        f"privacy.{name} = {value}"
        for name, value in (("noise", privacy.noise), ("epsilon", privacy.epsilon))
        if value
    ]
    if not privacy.clip:
        if given:
            raise ConfigError(
                f"{given[0]} with privacy.clip = 0: the noise is a multiple of the clip; allowed "
                f"is privacy.clip above 0"
            )
        return
    chosen = f"privacy.clip = {privacy.clip}"
    if len(given) != 1:
        raise ConfigError(
            f"{' and '.join(given) or 'privacy.noise = 0 and privacy.epsilon = 0'} with {chosen}: "
            f"allowed is one of privacy.noise and privacy.epsilon above 0 (server.clip_norm alone "
            f"clips without noise)"
        )
    refused = {
        f"algorithm = {FEDSP!r}": (
            config.algorithm == FEDSP,
            "what its clients give away is not known; allowed are the other algorithms",
        ),
        f"server.weighting = {server.weighting!r}": (
            server.weighting != "uniform",
            "divisors would depend on clients' rows; allowed is 'uniform'",
        ),
        f"server.clip_norm = {server.clip_norm}": (
            server.clip_norm,
            "privacy.clip stands in its place; allowed is 0",
        ),
        "upload.error_feedback = True": (
            config.upload.error_feedback,
            "what a client keeps is sent later; its sensitivity is not known; allowed is False",
        ),
    }
    for what, (is_set, why) in refused.items():
        if is_set:
            raise ConfigError(f"{what} with {chosen}: {why}")


def _check_tracing(config: Config) -> None:
    """What clients' own roundings do not go with."""
    if not config.tracing_margin:
        return
    chosen = f"tracing_margin = {config.tracing_margin}"
    if config.algorithm == "fedlpp" or config.lora.public_base:
        what = "lora.public_base = True" if config.lora.public_base else "algorithm = 'fedlpp'"
        raise ConfigError(
            f"{chosen} with {what}: only adapters travel, and a leaked model has them merged; "
            f"allowed is 0"
        )
    if config.server.rule != "delta":
        raise ConfigError(
            f"{chosen} with server.rule = {config.server.rule!r}, which needs one rounding for all "
            f"clients; allowed is server.rule = 'delta', or 0"
        )


def _check_one_way(config: Config, chosen: str) -> None:
    server = config.server
    plain = {
        f"server.optimizer = {server.optimizer!r}": server.optimizer == "sgd",
        f"server.learning_rate = {server.learning_rate}": server.learning_rate == 1,
        f"server.momentum = {server.momentum}": server.momentum == 0,
        f"server.decay = {server.decay!r}": server.decay == "none",
    }
    for what, is_plain in plain.items():
        if not is_plain:
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
