"""What masks and bits cost and buy: 64 settings of p1, p2 and bits, three seeds each, 30 rounds.

  python -m fedqsn_jax.sweep --config=configs/digits.py \
    --sweep=configs/sweeps/privacy_utility.py --workdir=runs/privacy_utility

Every pair of p1 and p2 out of 0, .1, .2, .4, with values sent as they are and in codes of 4, 3 and
2 bits. Without masks that is FedAvg and FedQ, with masks only FedSN, with both FedQSN. What it gave
on digits, and how long it took, is in the README.

``--sweep.seed=[0,1,2,3,4]`` or ``--sweep.rounds=60`` sets other values of a field, in all grids.
"""

PROBABILITIES = [0.0, 0.1, 0.2, 0.4]
BITS = [4, 3, 2]


def get_sweep():
    """Returns the grids: each is all combinations of its values."""
    common = {"seed": [0, 1, 2], "rounds": [30], "evaluation.every": [30]}
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
