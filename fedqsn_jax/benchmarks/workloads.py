"""The workloads on which simulators of federated learning are compared, and larger ones.

A round is 100 clients with 10,258 samples of 28x28 images in lognormal sizes 20 to 400, batch 20,
one local epoch of SGD, no evaluation; the images are noise around 62 prototypes, because speed does
not depend on them. ``cnn`` is `EmnistCNN`, ``dense`` an MLP 784-200-200-62.
"""

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from fedqsn_jax.config.schema import Config, resolve
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.types import Array, Batch, Params
from fedqsn_jax.data.generated import GeneratedData
from fedqsn_jax.data.population import ClientData, FederatedData, from_clients
from fedqsn_jax.models.functional import linen_apply, linen_init
from fedqsn_jax.models.image.emnist_cnn import EmnistCNN
from fedqsn_jax.models.image.mlp import MLP
from fedqsn_jax.simulation.compose import Simulation, make_simulation

CLASSES = 62
MODELS: dict[str, nn.Module] = {
    "cnn": EmnistCNN(CLASSES),
    "dense": MLP((200, 200), CLASSES),
}
NEVER = 10**7
"""A round that no run comes to."""


def make_population(clients: int = 100, mean: int = 100, seed: int = 0) -> FederatedData:
    """Makes clients with lognormal numbers of rows, 20 to 400; with the defaults 10,258 in all.

    Args:
      clients: Number of clients.
      mean: About the mean number of rows.
      seed: Seed of sizes, labels and noise.
    """
    generator = np.random.default_rng(seed)
    sizes = generator.lognormal(np.log(mean) - 0.125, 0.5, clients).astype(int).clip(20, 400)
    prototypes = generator.normal(size=(CLASSES, 28, 28, 1)).astype(np.float32)
    rows = []
    for size in sizes:
        labels = generator.integers(0, CLASSES, size).astype(np.int32)
        noise = generator.normal(size=(size, 28, 28, 1)).astype(np.float32)
        rows.append({"image": 0.5 * prototypes[labels] + noise, "label": labels})
    return from_clients(rows)


def make_endless_population(clients: int) -> GeneratedData:
    """Makes a population of any size that takes no memory; its clients are as `make_population`'s.

    Sizes are lognormal, 20 to 400; an image is a prototype that a hash of its label makes, and
    noise that a hash of client and row makes.
    """

    def row_count(ids: Array) -> Array:
        uniform = _uniform(ids.astype(jnp.uint32), jnp.uint32(1))
        normal = jax.scipy.special.ndtri(jnp.clip(uniform, 1e-6, 1 - 1e-6))
        return jnp.clip(100 * jnp.exp(0.5 * normal - 0.125), 20, 400).astype(jnp.int32)

    def example(client_id: Array, index: Array) -> Batch:
        row = client_id.astype(jnp.uint32) * jnp.uint32(512) + index.astype(jnp.uint32)
        label = (_uniform(row, jnp.uint32(2)) * CLASSES).astype(jnp.int32)
        pixels = jnp.arange(28 * 28, dtype=jnp.uint32)
        prototype = _uniform(pixels, label.astype(jnp.uint32) + jnp.uint32(3))
        noise = _uniform(pixels, row * jnp.uint32(0x9E3779B1))
        image = (2 * noise - 1) + (prototype - 0.5)
        return {"image": image.reshape(28, 28, 1), "label": label}

    return GeneratedData(clients, row_count, example)


def _uniform(words: Array, salt: Array) -> Array:
    """Hashes to [0, 1): two rounds of a 32-bit mixer (splitmix32's)."""
    mixed = words * jnp.uint32(0x9E3779B9) + salt
    mixed = (mixed ^ (mixed >> 16)) * jnp.uint32(0x21F0AAAD)
    mixed = (mixed ^ (mixed >> 15)) * jnp.uint32(0x735A2D97)
    return (mixed ^ (mixed >> 15)).astype(jnp.float32) * jnp.float32(2.0**-32)


def workload_config(
    algorithm: str, cohort: int, population: int, rounds_per_call: int, chunk_size: int = 0
) -> Config:
    """Returns the settings of a workload's rounds: no evaluation, no attackers' copies."""
    return resolve(
        {
            "algorithm": algorithm,
            "rounds": NEVER,
            "rounds_per_call": rounds_per_call,
            "client": {"batch_size": 20, "epochs": 1, "learning_rate": 0.1},
            "cohort": {"size": cohort, "chunk_size": chunk_size},
            "data": {"clients": population},
            "evaluation": {"every": NEVER, "attackers": ()},
        }
    )


def make_workload(model: str, config: Config, data: ClientData) -> tuple[Simulation, Params, Batch]:
    """Composes a workload.

    Args:
      model: A key of `MODELS`.
      config: Its settings.
      data: The population.

    Returns:
      The simulation, initial parameters and a few rows.
    """
    module = MODELS[model]
    rows = jax.jit(data.gather)(jnp.int32(0), jnp.arange(20, dtype=jnp.int32))
    params = linen_init(module, jax.random.key(0), rows)
    return (
        make_simulation(config, linen_apply(module), classification(), params, data),
        params,
        rows,
    )
