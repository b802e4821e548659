"""A run that takes seconds, by the command line or by `federate`: its flags, or its rows."""

import numpy as np

SMALL = [
    "--config=configs/digits.py",
    "--config.rounds=4",
    "--config.rounds_per_call=2",
    "--config.evaluation.every=2",
    "--config.evaluation.proxy_samples=2",
    "--config.checkpoint.every=2",
    "--config.pretraining.steps=5",
    "--config.client.steps=1",
    "--config.cohort.size=3",
    "--config.model.hidden=(16,)",
]


def rows(count, width=4):
    random = np.random.default_rng(count)
    x = random.normal(size=(count, width)).astype(np.float32)
    return {"image": x, "label": (x[:, 0] > 0).astype(np.int32)}


CLIENTS = [rows(5), rows(8)]
