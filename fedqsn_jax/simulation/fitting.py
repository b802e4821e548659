"""What a configuration makes of a model: its mask sites, its adapters, which tensors go where.

None of it depends on the values that a sweep may change within one compiled program.
"""

import functools
import math
from typing import NamedTuple

import jax

from fedqsn_jax.config.schema import Config, ConfigError
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import TensorRoles, in_float32, select_trained
from fedqsn_jax.core.types import ApplyFn, Batch, Params
from fedqsn_jax.problems.limits import MODEL
from fedqsn_jax.prompting.prompted_model import full_encoder, parts_of
from fedqsn_jax.protocol.algorithms import Algorithm
from fedqsn_jax.protocol.lora import Lora
from fedqsn_jax.protocol.low_rank import adapt
from fedqsn_jax.protocol.sites import Sites, embedding_rules, find_sites
from fedqsn_jax.protocol.stored_kernels import storable_kernels, with_stored_kernels
from fedqsn_jax.simulation.from_config import configured_adapters


class Model(NamedTuple):
    """A model with its purpose.

    Attributes:
      apply_fn: The model.
      client_apply: The model as clients train it.
      task: What it is for.
      params: Its parameters' shapes.
      size: The setting that decides on their size, or `limits.MODEL`.
    """

    apply_fn: ApplyFn
    client_apply: ApplyFn
    task: Task
    params: Params
    size: str = MODEL


class Fitted(NamedTuple):
    """A model as a run has it.

    Attributes:
      model: The model, with adapters if there are any.
      plain: The shapes of the plain model's parameters.
      reference: The shapes of what FedAvg would send.
      lora: The adapters, or None.
      merged_bytes: What a client's merged matrices take, with their gradients.
      sites: The mask sites.
      roles: Which tensors go where.
      batch: The shapes of a client's minibatch.
      stored: The paths of frozen kernels that stay codes; see `stored_kernels`.
    """

    model: Model
    plain: Params
    reference: Params
    lora: Lora | None
    merged_bytes: int
    sites: Sites
    roles: TensorRoles
    batch: Batch
    stored: frozenset[str] = frozenset()


def fit(config: Config, algorithm: Algorithm, plain: Model, batch: Batch) -> Fitted:
    """Finds a model's sites, adds its adapters and says which tensors go where.

    Args:
      config: The settings.
      algorithm: That of the settings.
      plain: The model without adapters.
      batch: The shapes of a client's minibatch.

    Raises:
      ConfigError: The settings do not fit the model.
    """
    sites = _sites(config, algorithm, plain.params)
    lora, merged = configured_adapters(config, plain.params), None
    adapters_only = algorithm.adapters_only
    public = adapters_only or config.lora.public_base
    plain = plain._replace(
        apply_fn=with_stored_kernels(plain.apply_fn),
        client_apply=with_stored_kernels(plain.client_apply),
    )
    model = plain
    if lora is not None:
        params = jax.eval_shape(lora.add, jax.random.key(0), plain.params)
        apply_fn, _ = adapt(lora, plain.apply_fn, params, batch)
        client_apply, merged = adapt(lora, plain.client_apply, params, batch)
        model = plain._replace(apply_fn=apply_fn, client_apply=client_apply, params=params)
        quantize = config.lora.quantize or adapters_only
        sites = lora.sites(sites, quantize=quantize, public=public, flat=adapters_only)
    try:
        wanted = config.client.trained or ("lora" if lora else "all",)
        trained = select_trained(model.params, wanted)
    except ValueError as error:
        raise ConfigError(f"client.trained: {error}") from error
    model = model._replace(
        params=jax.eval_shape(functools.partial(in_float32, trained=trained), model.params)
    )
    roles = TensorRoles(sent=trained if public else None, trained=trained, returned=trained)
    reference = plain.params
    if algorithm.prompts_only:
        auxiliary = config.fedsp.auxiliary_share > 0
        roles = parts_of(model.params, config.fedsp.tuned, auxiliary=auxiliary)
        sites, reference = Sites(), full_encoder(model.params)
    matrices = merged.adapters if merged else ()
    stored = frozenset[str]()
    if algorithm.quantizer and not algorithm.quantizer.mixes_columns and not public:
        own = {one.matrix.path for one in matrices} | algorithm.traced(sites)
        stored = storable_kernels(plain.client_apply, plain.params, batch, sites, trained) - own
    return Fitted(
        model=model,
        plain=plain.params,
        reference=reference,
        lora=lora,
        merged_bytes=sum(8 * math.prod(one.matrix.shape) for one in matrices),
        sites=sites,
        roles=roles,
        batch=batch,
        stored=stored,
    )


def _sites(config: Config, algorithm: Algorithm, params: Params) -> Sites:
    needed = algorithm.quantizer is not None or algorithm.p1 > 0 or algorithm.p2 > 0
    try:
        embeddings = embedding_rules(params) if config.quantize_embeddings else ()
        rules = (*config.site_rules, *embeddings)
        return find_sites(params, rules, config.sites, needed=needed)  # type: ignore[arg-type]
    except ValueError as error:
        raise ConfigError(f"site_rules: {error}") from error
