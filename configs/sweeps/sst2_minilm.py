"""MiniLM on SST-2: method, masks, bits, sites, and what is trained; 2 seeds, 12 rounds.

  python -m fedqsn_jax.sweep --config=configs/sst2_minilm.py \
    --sweep=configs/sweeps/sst2_minilm.py --workdir=runs/sst2_sweep \
    --config.data.train=tsv:sst2/train.tsv --config.data.test=tsv:sst2/test.tsv

All weights are trained at rate 1e-4, adapters of rank 8, and head with biases, at 1e-3. p1 and p2
are 0 (FedAvg in place of FedSN, and FedQ in place of FedQSN), .1, .2 and .3 together, and .3 alone.
FedLPP and plain federated LoRA have a public base and no masks.
"""

TOGETHER = [0.0, 0.1, 0.2, 0.3]
ALONE = 0.3
ALL_WEIGHTS = {"client.learning_rate": [1e-4]}
ADAPTERS = {"lora.rank": [8], "client.learning_rate": [1e-3]}
HEAD_AND_BIASES = {"client.trained": [("head", "biases")], "client.learning_rate": [1e-3]}


def get_sweep():
    """Returns the grids: each is all combinations of its values."""
    common = {"seed": [0, 1], "rounds": [12], "rounds_per_call": [12], "evaluation.every": [12]}

    def masked(algorithm, unmasked, pairs, **fields):
        """A grid for each pair; without masks a method has another name."""
        return [
            {"algorithm": [algorithm], "p1": [p1], "p2": [p2], **fields, **common}
            if p1 or p2
            else {"algorithm": [unmasked], **fields, **common}
            for p1, p2 in pairs
        ]

    def fedqsn(pairs, sites, bits, trained):
        return masked("fedqsn", "fedq", pairs, sites=[sites], bits=[bits], **trained)

    together = [(p, p) for p in TOGETHER]
    pairs = [*together, (ALONE, 0.0), (0.0, ALONE)]
    public = {**ADAPTERS, "lora.public_base": [True], **common}
    # Those that say most come first: an interruption keeps what is finished.
    return [
        *masked("fedsn", "fedavg", together, **ALL_WEIGHTS),
        *fedqsn(pairs, "all", 4, ALL_WEIGHTS),
        *fedqsn(pairs, "all", 4, ADAPTERS),
        *fedqsn(together, "residual", 4, ALL_WEIGHTS),
        *fedqsn(together, "all", 4, HEAD_AND_BIASES),
        *fedqsn(together, "residual", 4, ADAPTERS),
        *fedqsn(together, "all", 2, ALL_WEIGHTS),
        {"algorithm": ["fedavg"], **public},
        {"algorithm": ["fedlpp"], "bits": [4, 2], **public},
    ]
