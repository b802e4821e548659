"""A client's model, as the plan describes it: what it computes, and the shapes of its tensors."""

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from fedqsn_jax.config.paths import user_path
from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.tasks import Task, classification
from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import ApplyFn, Params
from fedqsn_jax.deploy.plan import Plan
from fedqsn_jax.models.functional import in_compute_dtype, linen_apply, linen_init
from fedqsn_jax.models.registry import make_model
from fedqsn_jax.protocol.lora import find_adapters
from fedqsn_jax.protocol.low_rank import adapt

Tensors = Mapping[str, Any]
"""Arrays by the paths of the parameters that they are."""


class ClientModel(NamedTuple):
    """What a client trains.

    Attributes:
      apply_fn: The model with its adapters, in the compute dtype.
      task: What it is for.
      params: The shapes of its parameters, those of adapters included.
    """

    apply_fn: ApplyFn
    task: Task
    params: Params


def client_model(plan: Plan, batch: Any) -> ClientModel:
    """Makes the model of a plan.

    Args:
      plan: What the server says of the federation.
      batch: The shapes of a minibatch.

    Raises:
      ValueError: The plan's model is not one that this version can make.
    """
    plain = _images(plan, batch) if plan.language is None else _language(plan)
    return _adapted(plan, plain, batch)


def _images(plan: Plan, batch: Any) -> ClientModel:
    client = plan.config().client
    module = make_model(plan.config().model, plan.classes, client.dropout)
    params = jax.eval_shape(lambda key, rows: linen_init(module, key, rows), _KEY, batch)
    apply_fn = in_compute_dtype(linen_apply(module), client.compute_dtype)
    return ClientModel(apply_fn, classification(), params)


def _language(plan: Plan) -> ClientModel:
    # Only here: images do without, and it takes a second to import.
    from fedqsn_jax.deploy.texts import kind_of, language_config
    from fedqsn_jax.models.language.families import make_language_model
    from fedqsn_jax.problems.language import execution_of, language_task

    config, model = plan.config(), language_config(plan)
    execution = execution_of(config.model, config.client.compute_dtype)
    made = make_language_model(model, execution, config.client.dropout)
    task = language_task(kind_of(plan), model, config.client.label_smoothing)
    return ClientModel(made.apply_fn, task, jax.eval_shape(made.init, _KEY))


def _adapted(plan: Plan, plain: ClientModel, batch: Any) -> ClientModel:
    settings = plan.config().lora
    if settings.rank == 0:
        return plain
    lora = find_adapters(
        plain.params,
        plan.config().site_rules,
        settings.matrices,
        settings.rank,
        settings.alpha or float(settings.rank),
    )
    params = jax.eval_shape(lora.add, _KEY, plain.params)
    return plain._replace(apply_fn=adapt(lora, plain.apply_fn, params, batch)[0], params=params)


_KEY = jax.ShapeDtypeStruct((), jax.eval_shape(lambda: jax.random.key(0)).dtype)


def public_tensors(params: Params, sent: set[str], base: Tensors | None) -> Params | None:
    """Returns the tensors of a public model that do not travel, with gaps for those that do.

    Args:
      params: The shapes of the model's parameters.
      sent: Paths of what travels.
      base: What the client has of the model.

    Returns:
      None where all of them travel.

    Raises:
      UserError: One that is needed is absent or of another shape.
    """
    shapes = leaves_by_path(params)
    needed = {path: leaf for path, leaf in shapes.items() if path not in sent}
    if not needed:
        return None
    if base is None:
        raise UserError(
            "base: the model is public and only a part of it travels; name a file or directory "
            "with the rest of it"
        )
    for path, leaf in needed.items():
        found = tuple(np.shape(base[path])) if path in base else "absent"
        if found != tuple(leaf.shape):
            raise UserError(f"base: {path!r} is {found}, the model has {tuple(leaf.shape)}")

    def tensor(key_path: Any, leaf: Any) -> Any:
        path = jax.tree_util.keystr(tuple(key_path), simple=True, separator="/")
        return jax.numpy.asarray(base[path], leaf.dtype) if path in needed else None

    return jax.tree_util.tree_map_with_path(tensor, params)


def read_base(plan: Plan, place: str) -> Tensors:
    """Reads what a client has of a public model.

    Args:
      plan: What the server says of the federation.
      place: A file of named arrays, or the directory of a language model.

    Raises:
      UserError: It cannot be read.
    """
    path = user_path(place)
    readers: dict[bool, Callable[[Plan, Path], Tensors]] = {True: _of_model, False: _of_file}
    try:
        return readers[path.is_dir()](plan, path)
    except (OSError, ValueError) as error:
        raise UserError(f"base = {place!r}: cannot be read: {error}") from error


def _of_file(plan: Plan, file: Path) -> Tensors:
    del plan
    with np.load(file, allow_pickle=False) as arrays:
        return dict(arrays)


def _of_model(plan: Plan, directory: Path) -> Tensors:
    from fedqsn_jax.models.language.pretrained import load_pretrained

    if plan.language is None:
        raise ValueError("it is a directory, and the model is none of language")
    # What the files lack is drawn at the server too, from a key of its own: that has to travel.
    read = load_pretrained(directory, jax.random.key(0), **plan.language["overrides"])
    return {
        path: leaf for path, leaf in leaves_by_path(read.params).items() if path not in read.fresh
    }
