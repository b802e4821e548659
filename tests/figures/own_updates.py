"""What a client's own update shows of its rows to the server: digits, one local step.

  python tests/figures/own_updates.py

The gradient of a dense layer's column is a sum of the batch's rows, each weighed as its bias is. So
of a column that one row alone moves, kernel over bias is that row (arXiv 2001.08435 and others).
For each client the server forms this quotient for every column of the first layer that changed, and
a row counts as read where one of them differs from it by less than a tenth of its norm.
"""

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import resolve, to_dict, with_fields
from fedqsn_jax.core.keys import federation_key
from fedqsn_jax.runs.preparation import prepare

COMMON = {
    "cohort.size": 1,
    "client.steps": 1,
    "client.optimizer": "sgd",
    "client.learning_rate": 0.1,
    "pretraining.steps": 0,
    "server.weighting": "uniform",
    "model.hidden": (256,),
}
METHODS = {
    "fedavg": {"algorithm": "fedavg"},
    "fedqsn": {"algorithm": "fedqsn"},
    "fedqsn, 4-bit updates": {"algorithm": "fedqsn", "upload.bits": 4},
    "fedavg, clip 0.1, noise 0.1": {
        "algorithm": "fedavg",
        "privacy.clip": 0.1,
        "privacy.noise": 0.1,
    },
}
CLIENTS = 20


def read_rows(values: dict) -> tuple[float, float]:
    """Shares of batches of which a row is read, and of all rows of batches that are."""
    config = resolve(to_dict(with_fields(read_config("configs/digits.py", []), COMMON | values)))
    experiment = prepare(config)
    federation, problem = experiment.simulation.federation, experiment.problem
    clients = problem.splits.clients
    state = jax.jit(federation.init)(federation_key(config.seed), problem.params)
    run, any_read, shares = jax.jit(federation.round), [], []
    for index in range(CLIENTS):
        before = state.replace(round=jnp.int32(index))
        client = federation.cohort(before)[0]
        after, _ = run(before, clients)
        change = jax.tree.map(lambda new, old: np.asarray(new - old), after.params, before.params)
        layer = change["hidden_0"]
        moved = np.abs(layer["bias"]) > 1e-12
        guesses = (layer["kernel"][:, moved] / layer["bias"][moved]).T
        count = int(clients.rows(client))
        rows = np.asarray(clients.gather(client, jnp.arange(count))["image"]).reshape(count, -1)
        distance = np.linalg.norm(guesses[:, None] - rows[None], axis=-1)
        read = (distance < 0.1 * np.linalg.norm(rows, axis=-1)).any(axis=0)
        any_read.append(read.any())
        shares.append(read.sum() / min(config.client.batch_size, count))
    return float(np.mean(any_read)), float(np.mean(shares))


if __name__ == "__main__":
    for name, values in METHODS.items():
        for batch in (1, 32):
            some, share = read_rows({**values, "client.batch_size": batch})
            print(f"{name}, batch {batch}: of {some:.0%} of batches a row; {share:.0%} of rows")
