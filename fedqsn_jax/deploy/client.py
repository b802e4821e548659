"""A client's part in a round: decode the proxy, train it on own rows, encode the update.

Nothing here knows the server's state, and nothing depends on how messages travel.
"""

import dataclasses
from collections.abc import Callable, Mapping

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.core.errors import UserError
from fedqsn_jax.core.trees import combine
from fedqsn_jax.core.types import Array, Batch, Key, Params
from fedqsn_jax.data.population import FederatedData, single_client
from fedqsn_jax.deploy.client_model import Tensors, client_model, public_tensors
from fedqsn_jax.deploy.plan import Plan, layout_of
from fedqsn_jax.problems.training import local_optimizer
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import Proxy, dequantize_proxy
from fedqsn_jax.protocol.upload import quantize_delta, quantized_upload, whole_upload
from fedqsn_jax.protocol.wire import decode_proxy, encode_update
from fedqsn_jax.rounds.client import make_client_update


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a client returns.

    Attributes:
      payload: Its update, as `wire.encode_update` makes it.
      examples: Number of its rows.
      loss: Its mean training loss.
    """

    payload: bytes
    examples: int
    loss: float


@dataclasses.dataclass(frozen=True)
class Client:
    """A client's model and training, ready for any round of one plan.

    Attributes:
      layout: The structure of payloads.
      train: ``(key, proxy, rows) -> (delta to send, loss)``, jitted.
      base: What the client has of the model itself: tensors that do not travel, or None.
    """

    layout: Layout
    train: Callable[[Key, Proxy, FederatedData], tuple[Params, Array]]
    base: Params | None

    def answer(self, payload: bytes, key: Key, rows: Batch) -> Answer:
        """Takes part in one round.

        Args:
          payload: What the server sent.
          key: The key of the client's batches and dropout in this round.
          rows: The client's rows; see `check_rows`.

        Raises:
          ValueError: The payload is damaged, or for another model or version.
        """
        proxy = dequantize_proxy(decode_proxy(payload, self.layout))
        if self.base is not None:
            proxy = dataclasses.replace(proxy, params=combine(proxy.params, self.base))
        delta, loss = self.train(key, proxy, single_client(rows))
        if self.layout.upload is not None:
            delta = quantize_delta(delta, self.layout.upload, self.layout.sites)
        update = encode_update(delta, _masks(proxy, self.layout), self.layout)
        examples = len(next(iter(rows.values())))
        return Answer(update, examples, float(loss))


def make_client(plan: Plan, base: Tensors | None = None) -> Client:
    """Makes a client of a plan: the model's structure and its compiled training.

    Args:
      plan: What the server says of the federation.
      base: What the client has of a public model, of which only a part travels.

    Raises:
      UserError: Of a public model something is needed that ``base`` has not.
      ValueError: The plan's model is not one that this version can make.
    """
    config = plan.config()
    batch = {
        name: jax.ShapeDtypeStruct((config.client.batch_size, *shape), dtype)
        for name, (shape, dtype) in plan.rows.items()
    }
    model = client_model(plan, batch)
    layout = layout_of(plan, model.params)
    public = public_tensors(model.params, {tensor.path for tensor in layout.tensors}, base)
    upload = whole_upload()
    if layout.upload is not None:
        upload = quantized_upload(layout.upload, layout.sites, trained=layout.trained)
    update = make_client_update(
        model.apply_fn,
        model.task,
        local_optimizer(config.client),
        batch_size=config.client.batch_size,
        steps=config.client.steps,
        epochs=config.client.epochs,
        trained=layout.trained,
        proximal=config.client.proximal,
    )

    @jax.jit
    def train(key: Key, proxy: Proxy, rows: FederatedData) -> tuple[Params, Array]:
        result = update.train(key, proxy, rows, jnp.int32(0))
        delta, _ = upload.send(result.delta, {}, proxy.visible)
        return delta, result.loss

    return Client(layout, train, public)


def check_rows(plan: Plan, rows: Mapping[str, np.ndarray], where: str) -> Batch:
    """Returns a client's rows as the plan wants them.

    Args:
      plan: What the server says of the federation.
      rows: Named arrays ``[rows, ...]``.
      where: Where they come from, for messages.

    Raises:
      UserError: An array is missing, or has another shape or dtype, or a label is out of range.
    """
    fitting = {}
    lengths = {len(array) for array in rows.values()}
    if len(lengths) > 1:
        raise UserError(f"{where}: arrays of {sorted(lengths)} rows; allowed is one length")
    for name, (shape, dtype) in plan.rows.items():
        if name not in rows:
            raise UserError(f"{where}: no array {name!r}; it has {', '.join(sorted(rows))}")
        array = np.asarray(rows[name])
        if array.shape[1:] != shape or not np.can_cast(array.dtype, dtype, "same_kind"):
            raise UserError(
                f"{where}: {name!r} is {array.dtype}{list(array.shape[1:])} a row, "
                f"the task needs {dtype}{list(shape)}"
            )
        fitting[name] = jnp.asarray(array, dtype)
    label = np.asarray(rows.get("label", []))
    if label.size and not (label.min() >= 0 and label.max() < plan.classes):
        raise UserError(
            f"{where}: 'label' has values of {label.min()} to {label.max()}, "
            f"the task has 0 to {plan.classes - 1}"
        )
    return fitting


def _masks(proxy: Proxy, layout: Layout) -> dict[str, Array]:
    return {path: proxy.visible[path] for path in layout.masked}
