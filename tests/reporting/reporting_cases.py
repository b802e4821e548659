"""The metrics and costs of a small run that the tests of reporting share."""

from fedqsn_jax.reporting.summary import Costs

VIEWS = ("global", "server", "proxy", "attacker_1", "attacker_10")
COSTS = Costs(300.0, 700.0, 1000.0, 1400.0, (("server's state", 3 * 2**20), ("rows", 10)))


def entry(round, accuracies, losses=None, **more):
    losses = losses or [1.0] * len(VIEWS)
    scores = {f"{view}/accuracy": a for view, a in zip(VIEWS, accuracies, strict=True)}
    scores |= {f"{view}/loss": loss for view, loss in zip(VIEWS, losses, strict=True)}
    return {"round": round, **scores, "proxy/accuracy_std": 0.01 * (round + 1), **more}


def bytes_of(down, up):
    return {"bytes/down_per_client": down, "bytes/up_per_client": up}


def make_history():
    return [
        entry(0, (0.50, 0.45, 0.40, 0.10, 0.10), (2.0, 2.1, 2.2, 2.3, 2.4), seconds=0.0),
        entry(5, (0.90, 0.80, 0.70, 0.60, 0.75), **bytes_of(200.0, 600.0), seconds=2.0),
        entry(10, (0.90, 0.85, 0.65, 0.75, 0.80), **bytes_of(400.0, 500.0), seconds=4.0),
        entry(
            20, (0.875, 0.75, 0.6875, 0.625, 0.8125), (0.5,) * 5, **bytes_of(300, 400), seconds=8.0
        ),
    ]
