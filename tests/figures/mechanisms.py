"""Ways to protect a model that were tried beside masks and one-way rounds, on the digits.

  python tests/figures/mechanisms.py --seeds=0,1,2

One process, few programs: 30 rounds of 10 of 20 clients as in `configs/digits.py`, in float32.
U is against FedAvg here; P is the mean over four lone clients, and over two coalitions of
three, who hold all that their masks allow: the better on the test rows of the union as it is, and
trained, of which rate and steps are chosen on a fifth of their rows.
One-way scales are the best of 1, 2, 3 and 5 on the test rows, in the mean over seeds.
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.audit.case import random_weights
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.protocol.sites import find_sites
from fedqsn_jax.rounds.evaluation import make_held_measure
from fedqsn_jax.rounds.fine_tuning import RATES, everything, make_fine_tuning
from fedqsn_jax.rounds.pooled_rows import divide, pooled_rows
from fedqsn_jax.runs.preparation import prepare

CLIENTS, ROUNDS, COHORT, STEPS, BATCH, RATE = 20, 30, 10, 20, 32, 0.1
HIDDEN = ("hidden_0", "hidden_1")
SCALES = (1.0, 2.0, 3.0, 5.0)
LONE, TRIPLES = [(0,), (1,), (2,), (3,)], [(0, 1, 2), (3, 4, 5)]
PLACES = (1024, 256)


def apply_fn(params, batch, key=None):
    """The model; with ``skip`` of 1 the second hidden layer is dropped."""
    rows = batch["image"].reshape(len(batch["image"]), -1)
    layers = {name: params[name] for name in (*HIDDEN, "head")}
    first = jax.nn.relu(rows @ layers["hidden_0"]["kernel"] + layers["hidden_0"]["bias"][None])
    second = jax.nn.relu(first @ layers["hidden_1"]["kernel"] + layers["hidden_1"]["bias"][None])
    last = jnp.where(params["skip"] > 0, first, second)
    return last @ layers["head"]["kernel"] + layers["head"]["bias"][None]


def loss_of(params, batch):
    """Mean cross-entropy."""
    each = -jnp.take_along_axis(
        jax.nn.log_softmax(apply_fn(params, batch)), batch["label"][:, None], 1
    )[:, 0]
    return each.mean()


gradient = jax.jit(jax.grad(loss_of))
loss = jax.jit(loss_of)


def factor_of(params, masks):
    """A factor for each tensor: masks' columns are divided by the visible share."""
    factor = jax.tree.map(lambda leaf: jnp.ones(leaf.shape), params)
    for name, mask in masks.items():
        column = mask / jnp.maximum(mask.mean(), 1e-3)
        factor[name] = {"kernel": jnp.broadcast_to(column[None], params[name]["kernel"].shape),
                        "bias": column}  # fmt: skip
    return factor


@jax.jit
def train(theta, factor, rows, begin, count, steps, rate, key):
    """SGD on theta where the model sees theta times factor."""

    def step(index, theta):
        drawn = jax.random.randint(jax.random.fold_in(key, index), (BATCH,), 0, count)
        batch = {name: array[begin + drawn] for name, array in rows.items()}
        slope = jax.grad(lambda t: loss_of(jax.tree.map(jnp.multiply, t, factor), batch))(theta)
        return jax.tree.map(
            lambda t, s, f: jnp.where(f == 0, t, t - rate * s), theta, slope, factor
        )

    start = {**theta}
    return {**jax.lax.fori_loop(0, steps, step, start), "skip": theta["skip"]}


def add(params, delta, scale=1.0):
    return {**jax.tree.map(lambda w, d: w + scale * d, params, delta), "skip": params["skip"]}


def minus(first, second):
    return jax.tree.map(jnp.subtract, first, second)


def low_rank(rank):
    def of(kernel):
        u, s, v = jnp.linalg.svd(kernel, full_matrices=False)
        return (u[:, :rank] * s[None, :rank]) @ v[:rank]

    return lambda w: {**w, **{n: {**w[n], "kernel": of(w[n]["kernel"])} for n in HIDDEN}}


class Seed:
    """The digits of one seed: the start, everybody's rows, what coalitions reach alone."""

    def __init__(self, seed):
        config = read_config("configs/digits.py", [f"--config.seed={seed}"])
        experiment = prepare(config)
        problem, self.seed = experiment.problem, seed
        params = pretrain(
            config, problem.pretraining_apply, problem.task, problem.params, experiment.private
        )
        self.start = {**jax.tree.map(jnp.asarray, params), "skip": jnp.float32(0)}
        self.rows = {name: jnp.asarray(a) for name, a in problem.splits.clients.examples.items()}
        self.offsets = np.asarray(problem.splits.clients.offsets)
        self.data, self.test = problem.splits.clients, problem.splits.test
        self.private = {name: jnp.asarray(a) for name, a in experiment.private.items()}
        generator = np.random.default_rng(seed)
        self.cohorts = [generator.permutation(CLIENTS)[:COHORT] for _ in range(ROUNDS)]
        sites = find_sites({name: params[name] for name in (*HIDDEN, "head")})
        self.alone = {}
        for members in (*LONE, *TRIPLES):
            random = random_weights(jax.random.key(7), self.start, sites)
            self.alone[members] = self.attack({**random, "skip": jnp.float32(0)}, members, None)

    def score(self, params):
        return float((evaluate(params, self.test) == self.test["label"]).mean())

    def attack(self, params, members, masks):
        """Test score of a coalition, the better of its model as it is and trained."""
        each = divide(self.data, members, self.seed)
        trainable = everything(params)
        if masks is not None:
            known = factor_of(params, masks)
            trainable = jax.tree.map(lambda f: f > 0, known)
            params = {**jax.tree.map(jnp.multiply, params, known), "skip": params["skip"]}
        trainable["skip"] = jnp.zeros((), bool)
        rows = pooled_rows(each.train, each.held, PLACES)
        steps = int(min(max(10 * int(rows.trained) // BATCH, 200), 1000))
        key = jax.random.key(hash(members) % 2**31)
        tuned = fine_tune(params, trainable, rows, steps, key).params
        return max(self.score(params), self.score(tuned))

    def delta(self, theta, factor, client, key):
        begin, count = self.offsets[client], self.offsets[client + 1] - self.offsets[client]
        end = train(theta, factor, self.rows, jnp.int32(begin), jnp.int32(count), STEPS, RATE, key)
        return minus(end, theta), float(count)


evaluate = jax.jit(lambda params, rows: apply_fn(params, rows).argmax(-1))
fine_tune = make_fine_tuning(
    apply_fn,
    classification().loss,
    make_held_measure(apply_fn, classification(), 256),
    batch_size=BATCH,
    rates=RATES,
    at_once=1,
)


def bernoulli(key, share):
    """Visible columns of both hidden layers."""
    return {
        name: jax.random.bernoulli(jax.random.fold_in(key, index), share, (256,)).astype(float)
        for index, name in enumerate(HIDDEN)
    }


def scored(seed, share, high):
    """Masks that hide the columns with the largest (or smallest) loss shift over gradient shift.

    GradOT (ACL 2025) picks what to remove so that the loss changes much and the gradient little.
    """
    start, rows = seed.start, seed.private
    whole, base = gradient(start, rows), float(loss(start, rows))
    masks = {}
    for name in HIDDEN:
        ratio = []
        for column in range(256):
            mask = jnp.ones(256).at[column].set(0)
            without = {**start, name: {"kernel": start[name]["kernel"] * mask[None],
                                       "bias": start[name]["bias"] * mask}}  # fmt: skip
            slope = gradient(without, rows)
            change = jax.tree.leaves(minus(slope, whole))
            shift = sum(float(jnp.square(each).sum()) for each in change)
            ratio.append(abs(float(loss(without, rows)) - base) / (shift**0.5 + 1e-8))
        order = np.argsort(ratio)
        hidden = order[-int(share * 256) :] if high else order[: int(share * 256)]
        masks[name] = jnp.ones(256).at[jnp.asarray(hidden)].set(0)
    return masks


def nothing(seed):
    whole = {name: jnp.ones(256) for name in HIDDEN}
    return dict.fromkeys(range(CLIENTS), whole)


def server_masks(p1):
    return lambda seed: dict.fromkeys(
        range(CLIENTS), bernoulli(jax.random.key(100 + seed.seed), 1 - p1)
    )


def own_masks(p1, p2, group=1):
    """Sticky masks, one for so many clients in turn."""

    def make(seed):
        server = bernoulli(jax.random.key(100 + seed.seed), 1 - p1)
        found = {}
        for client in range(CLIENTS):
            key = jax.random.fold_in(jax.random.key(200 + seed.seed), client // group)
            own = bernoulli(key, 1 - p2)
            found[client] = {name: server[name] * own[name] for name in HIDDEN}
        return found

    return make


def score_masks(share, high):
    return lambda seed: dict.fromkeys(range(CLIENTS), scored(seed, share, high))


def align(params, masks, seed):
    """LoRAM: the visible part is trained on the server's rows before it is sent."""
    factor, count = factor_of(params, masks), len(seed.private["label"])
    key = jax.random.key(11)
    return train(params, factor, seed.private, jnp.int32(0), jnp.int32(count), 200, 0.05, key)


def corrected(delta, start, sent, limit=0.25, rank=16):
    """EMLoC: the degraded model's error, along what was learned, is taken out of the delta."""
    new = {**delta}
    for name in HIDDEN:
        d = delta[name]["kernel"]
        u = jnp.linalg.svd(d, full_matrices=False)[0]
        along = u[:, :rank] @ u[:, :rank].T
        fix = along @ (sent[name]["kernel"] - start[name]["kernel"])
        fix = fix * jnp.minimum(1, limit * jnp.linalg.norm(d) / jnp.linalg.norm(fix))
        new[name] = {**delta[name], "kernel": d + fix}
    return new


def chosen_weights(deltas, counts, seed):
    """Weights of clients by which the server's rows have the least loss."""
    stacked = jax.tree.map(lambda *each: jnp.stack(each), *deltas)
    first = jnp.log(jnp.asarray(counts) / sum(counts))

    def summed(logits):
        weights = jax.nn.softmax(logits)
        return jax.tree.map(lambda d: jnp.tensordot(weights, d, 1), stacked)

    slope = jax.jit(jax.grad(lambda x: loss_of(add(seed.start, summed(x), 2.0), seed.private)))
    logits = first
    for _ in range(100):
        logits = logits - 2.0 * slope(logits)
    return summed(logits)


MECHANISMS = {
    "FedAvg": {"broadcast": True},
    "one-way, whole model": {},
    "one-way, p1 = .2": {"masks": server_masks(0.2)},
    "one-way, p1 = .3": {"masks": server_masks(0.3)},
    "one-way, sticky, p1 = .1, p2 = .5": {"masks": own_masks(0.1, 0.5)},
    "one-way, score-chosen .2, high": {"masks": score_masks(0.2, True)},
    "one-way, score-chosen .2, low": {"masks": score_masks(0.2, False)},
    "one-way, layer dropped": {"drop": True},
    "layer dropped, broadcast": {"drop": True, "broadcast": True},
    "one-way, rank 16": {"sent": low_rank(16)},
    "one-way, rank 8": {"sent": low_rank(8)},
    "one-way, rank 8, delta corrected": {"sent": low_rank(8), "correct": True},
    "one-way, p1 = .3, aligned": {"masks": server_masks(0.3), "align": True},
    "sticky p2 = .5, own, broadcast": {"masks": own_masks(0.0, 0.5), "broadcast": True},
    "sticky p2 = .5, groups of 3, broadcast": {"masks": own_masks(0.0, 0.5, 3), "broadcast": True},
    "one-way, sticky p2 = .5, groups of 3": {"masks": own_masks(0.0, 0.5, 3)},
    "one-way, whole model, weights chosen": {"weights": True},
    "one-way, p1 = .2, weights chosen": {"masks": server_masks(0.2), "weights": True},
}


def learn(seed, option):
    """Plays the rounds: the global models by scale, what is sent at the end, and the masks."""
    make = option.get("sent", lambda w: w)
    masks = option.get("masks", nothing)(seed)
    skip = jnp.float32(option.get("drop", False))

    def proxy(params, client):
        sent = {**make(params), "skip": skip}
        return align(sent, masks[client], seed) if option.get("align") else sent

    factors = {client: factor_of(seed.start, masks[client]) for client in range(CLIENTS)}
    world, fixed = seed.start, {}
    if not option.get("broadcast"):
        fixed = {client: proxy(seed.start, client) for client in range(CLIENTS)}
    sums, weight = [None] * CLIENTS, [0.0] * CLIENTS
    for index, cohort in enumerate(seed.cohorts):
        found = []
        for client in map(int, cohort):
            key = jax.random.fold_in(jax.random.fold_in(jax.random.key(5), index), client)
            theta = fixed[client] if fixed else proxy(world, client)
            delta, count = seed.delta(theta, factors[client], client, key)
            found.append((delta, count))
            sums[client] = delta if sums[client] is None else add(sums[client], delta)
            weight[client] += 1
        if not fixed:
            total = sum(count for _, count in found)
            for delta, count in found:
                world = add(world, delta, count / total)
    if not fixed:
        return [world] * len(SCALES), make(world), masks, skip
    deltas = [
        jax.tree.map(lambda d, w=w: d / max(w, 1), s) for s, w in zip(sums, weight, strict=True)
    ]
    counts = list(np.diff(seed.offsets) * np.asarray(weight))
    if option.get("weights"):
        mean = chosen_weights(deltas, counts, seed)
    else:
        mean = jax.tree.map(
            lambda *each: sum(n * d for n, d in zip(counts, each, strict=True)) / sum(counts),
            *deltas,
        )
    if option.get("correct"):
        mean = corrected(mean, seed.start, fixed[0])
    worlds = [add(seed.start, mean, scale) for scale in SCALES]
    return worlds, fixed[0] if option.get("align") else make(seed.start), masks, skip


def measure(seed, option):
    worlds, sent, masks, skip = learn(seed, option)
    attacks = {}
    for members in (*LONE, *TRIPLES):
        union = {name: jnp.max(jnp.stack([masks[m][name] for m in members]), 0) for name in HIDDEN}
        attacks[members] = seed.attack({**sent, "skip": skip}, members, union)
    return [seed.score(world) for world in worlds], attacks


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", default="0,1,2")
    parser.add_argument("--only", default="", help="part of the mechanisms' names")
    options = parser.parse_args()
    seeds = [Seed(int(each)) for each in options.seeds.split(",")]
    start = [seed.score(seed.start) for seed in seeds]
    print("start", np.round(start, 3), flush=True)
    for group in (LONE, TRIPLES):
        print("alone", [round(np.mean([s.alone[m] for m in group]), 3) for s in seeds], flush=True)
    fedavg = None
    for name, option in MECHANISMS.items():
        if options.only not in name and name != "FedAvg":
            continue
        found = [measure(seed, option) for seed in seeds]
        scores = np.array([each[0] for each in found])
        best = int(scores.mean(axis=0).argmax())
        world = scores[:, best]
        fedavg = world if fedavg is None else fedavg
        kept = (world.mean() - np.mean(start)) / (fedavg.mean() - np.mean(start))
        told = [f"{name:40} {world.mean():.3f}  U {kept:5.2f}  scale {SCALES[best]:g}"]
        for group in (LONE, TRIPLES):
            attack = np.array([np.mean([each[1][m] for m in group]) for each in found])
            alone = np.array([np.mean([s.alone[m] for m in group]) for s in seeds])
            share = (world.mean() - attack.mean()) / (world.mean() - alone.mean())
            told.append(f"{len(group[0])}: attack {attack.mean():.3f} P {share:5.2f}")
            each = (world - attack) / (world - alone)
            told.append(f"({', '.join(f'{p:.2f}' for p in each)})")
        print("  ".join(told), flush=True)


if __name__ == "__main__":
    main()
