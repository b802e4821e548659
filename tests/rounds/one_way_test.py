"""One-way rounds, masks that clients keep, and rounds that send what was learned more rarely."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rounds_cases import FEDQSN, KEY, POPULATION, cohort_of, double, fast, federate, octets

from fedqsn_jax.config.schema import Config, resolve, to_dict, with_fields
from fedqsn_jax.core.keys import federation_key, sticky_client_key
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.data.population import HeldOut, from_clients
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.protocol.algorithms import fedavg
from fedqsn_jax.protocol.broadcast import Broadcast
from fedqsn_jax.protocol.proxy import whole_proxy
from fedqsn_jax.protocol.wire import encode_proxy
from fedqsn_jax.rounds.aggregation import make_running_mean
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.simulation.compose import make_simulation
from fedqsn_jax.simulation.from_config import SCALES
from fedqsn_jax.simulation.running import entry_of, initial_state, run_rounds

ONE_WAY = Broadcast(every=0)


def own_rows(client, seed):
    """Eight clients' rows, of which only this client's do not depend on the seed."""

    def rows(index):
        rng = np.random.default_rng([index, 0 if index == client else seed])
        count = 6
        return {
            "x": rng.normal(size=(count, 6)).astype(np.float32),
            "label": rng.integers(0, 3, count).astype(np.int32),
        }

    return from_clients([rows(index) for index in range(POPULATION)])


def payloads(method, federation, params, data, client, rounds=3):
    """What a client is sent in each of some rounds, whether it takes part or not."""
    transform, found = method["transform"], []
    state, run = fast(federation.init)(KEY, params), fast(federation.round)

    @fast
    def proxy(state):
        model = method["broadcast"].sent(state.broadcast, state.params)
        prepared = transform.prepare(state.transform_state, whole_proxy(model, method["sites"]))
        key = method["key"](state.secret_key, state.round, client)
        return transform.apply(key, state.transform_state, prepared)

    for _ in range(rounds):
        found.append(encode_proxy(jax.device_get(proxy(state))))
        state, _ = run(state, data)
    return found, state


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("mask_per", ["round", "client"])
@pytest.mark.parametrize("broadcast", [ONE_WAY, Broadcast(), Broadcast(every=2)], ids=str)
def test_payloads_tell_nothing_of_other_clients_rows(model, broadcast, mask_per):
    """Invariant 10, and that it is one-way rounds that have it."""
    federation = federate(model, FEDQSN, cohort=POPULATION, broadcast=broadcast, mask_per=mask_per)
    keys = Method(None, None, None, model.sites, mask_per=mask_per)  # type: ignore[arg-type]
    method = {
        "transform": FEDQSN.transform,
        "broadcast": broadcast,
        "sites": model.sites,
        "key": keys.mask_key,
    }
    (first, one), (second, another) = (
        payloads(method, federation, model.params, own_rows(5, seed), client=5) for seed in (1, 2)
    )
    trained = np.asarray(one.params["head"]["kernel"])
    assert (trained != np.asarray(another.params["head"]["kernel"])).any(), "other rows"
    same = [a == b for a, b in zip(first, second, strict=True)]
    assert (
        same
        == {0: [True, True, True], 1: [True, False, False], 2: [True, True, False]}[broadcast.every]
    )
    assert (len(set(first)) == 1) == (broadcast.is_one_way and mask_per == "client")


@pytest.mark.usefixtures("quick_compilation")
def test_one_way_rounds_are_a_running_mean(model, data):
    """Against single rounds of federated averaging, each from the first model, in NumPy."""
    one_way = federate(model, fedavg(), broadcast=ONE_WAY, scale=1.5)
    state, run = one_way.init(KEY, model.params), fast(one_way.round)
    plain = federate(model, fedavg())
    single = fast(plain.round)
    start, total, weights = double(model.params), jax.tree.map(np.zeros_like, model.params), 0.0
    for index in range(4):
        begin = plain.init(KEY, model.params).replace(round=jnp.int32(index))
        after, _ = single(begin, data)
        weight = float(np.diff(data.offsets)[cohort_of(begin)].sum())
        total = jax.tree.map(
            lambda t, new, old, w=weight: t + w * (np.asarray(new, np.float64) - old),
            total,
            after.params,
            start,
        )
        weights += weight
        state, _ = run(state, data)
        expected = jax.tree.map(lambda old, t, w=weights: old + 1.5 * t / w, start, total)
        for ours, theirs in zip(
            jax.tree.leaves(state.params), jax.tree.leaves(expected), strict=True
        ):
            np.testing.assert_allclose(ours, theirs, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("normalize", ["mean", "coverage"])
def test_the_running_mean_of_columns_that_few_have_seen(model, normalize):
    """Against one column at a time in NumPy; a column that nobody saw stays as it is."""
    rng = np.random.default_rng(3)
    aggregator = make_running_mean(model.sites, normalize=normalize, scale=0.5)
    params, state = model.params, aggregator.init(model.params)
    server = {site.path: rng.random((1, site.columns)) < 0.8 for site in model.sites}
    never = {site.path: rng.random((1, site.columns)) < 0.2 for site in model.sites}
    layers = [site.path.partition("/")[0] for site in model.sites]
    sums = {layer: np.zeros(np.shape(params[layer]["kernel"])) for layer in layers}
    seen_by = {layer: np.zeros(sums[layer].shape[1]) for layer in layers}
    head, weights = np.zeros(np.shape(params["head"]["kernel"])), 0.0
    finish = fast(aggregator.finish)
    for _ in range(3):
        parts = []
        for rows in (2, 7):
            visible = {
                path: seen & ~never[path] & (rng.random(seen.shape) < 0.6)
                for path, seen in server.items()
            }
            delta = jax.tree.map(lambda leaf: rng.normal(size=leaf.shape).astype("f"), params)
            for layer in layers:
                seen = visible[f"{layer}/kernel"][0]
                delta[layer]["kernel"][:, ~seen] = 0
                delta[layer]["bias"][~seen] = 0
                sums[layer] += rows * delta[layer]["kernel"]
                seen_by[layer] += rows * seen
            head += rows * delta["head"]["kernel"]
            weights += rows
            parts.append(aggregator.contribute(delta, aggregator.weigh(jnp.int32(rows)), visible))
        total = jax.tree.map(jnp.add, *parts)
        after, state = finish(params, state, total, server)
        np.testing.assert_allclose(
            after["head"]["kernel"],
            params["head"]["kernel"] + 0.5 * head / weights,
            rtol=1e-5,
            atol=1e-6,
        )
        for layer in layers:
            divisor = (
                seen_by[layer] if normalize == "coverage" else np.full_like(seen_by[layer], weights)
            )
            mean = np.divide(sums[layer], divisor, out=0 * sums[layer], where=divisor > 0)
            expected = np.asarray(params[layer]["kernel"]) + 0.5 * mean
            np.testing.assert_allclose(after[layer]["kernel"], expected, rtol=1e-5, atol=1e-6)
            untouched = ~server[f"{layer}/kernel"][0] | never[f"{layer}/kernel"][0]
            for leaf in ("kernel", "bias"):
                before, now = (np.asarray(tree[layer][leaf]) for tree in (params, after))
                assert now[..., untouched].tobytes() == before[..., untouched].tobytes()


def simulation_of(model, data, **values):
    common = {
        "rounds": 5,
        "rounds_per_call": 2,
        "p1": 0.3,
        "p2": 0.4,
        "bits": 2,
        "block_size": 4,
        "cohort.size": 3,
        "client.batch_size": 4,
        "client.learning_rate": 0.2,
        "evaluation.attackers": (1, 4),
        "evaluation.proxy_samples": 4,
        "evaluation.batch_size": 16,
        "broadcast.every": 0,
    }
    changes = {name.replace("__", "."): value for name, value in values.items()}
    config = resolve(to_dict(with_fields(Config(), common | changes)))
    return make_simulation(config, model.apply_fn, classification(), model.params, data)


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize(
    "values",
    [
        {"mask_per": "client", "server__scale": 0.0, "server__normalize": "coverage"},
        {"broadcast__every": 3, "broadcast__share": 0.5, "server__momentum": 0.5},
    ],
    ids=["one-way", "rarely"],
)
def test_a_run_goes_on_from_its_checkpoint_bit_for_bit(model, data, tmp_path, values):
    simulation = simulation_of(model, data, **values)
    validation = {name: rows[:20] for name, rows in data.examples.items()}
    rows = HeldOut(data.examples, {}, validation)
    state, ends = initial_state(simulation, model.params), []
    with Checkpoints(tmp_path, 5, 0) as checkpoints:
        for finished, after, entries in run_rounds(simulation, state, data, rows):
            checkpoints.save(finished, jax.tree.map(jnp.copy, after), [{"round": finished}], 0.0)
            ends.append((finished, octets(after), [dict(e, seconds=0) for e in entries]))
        checkpoints.wait()
        like = jax.eval_shape(simulation.federation.init, KEY, model.params)
        restored, _ = checkpoints.restore(like, 2)
    again = [
        (finished, octets(after), [dict(entry, seconds=0) for entry in entries])
        for finished, after, entries in run_rounds(simulation, restored, data, rows)
    ]
    assert again == ends[1:]


@pytest.mark.usefixtures("quick_compilation")
def test_the_scale_is_the_best_on_the_validation_rows(model, data):
    simulation = simulation_of(model, data, algorithm="fedavg", server__scale=0.0)
    rng = np.random.default_rng(9)
    validation = {name: rows[rng.permutation(41)[:25]] for name, rows in data.examples.items()}
    federation, evaluate = (
        simulation.federation,
        fast(make_evaluator(model.apply_fn, classification(), 16)),
    )
    state, run = fast(federation.init)(KEY, model.params), fast(federation.round)
    for _ in range(3):
        state, _ = run(state, data)
    chosen = fast(federation.choose_scale)(state, HeldOut(data.examples, {}, validation))

    def at(scale):
        return jax.tree.map(lambda old, new: old + scale * (new - old), model.params, state.params)

    scores = [float(evaluate(at(scale), validation)["accuracy"]) for scale in SCALES]
    assert len(set(scores)) > 1, "the scale matters"
    best = SCALES[int(np.argmax(scores))]
    assert float(chosen.optimizer_state.scale) == best
    for ours, theirs in zip(jax.tree.leaves(chosen.params), jax.tree.leaves(at(best)), strict=True):
        np.testing.assert_allclose(ours, theirs, rtol=1e-4, atol=1e-5)
    metrics = fast(federation.evaluate)(chosen, HeldOut(data.examples, {}, validation))
    assert float(metrics["global/scale"]) == best


def lengths_of_payloads(simulation, params, cohorts):
    """Bytes of all payloads of a run that has just begun, one after the other, encoded."""
    method, transform = simulation.method, simulation.method.transform
    state = fast(simulation.federation.init)(federation_key(simulation.config.seed), params)
    whole = whole_proxy(params, method.sites)
    prepared = fast(transform.prepare)(state.transform_state, whole)
    apply, lengths, received = fast(transform.apply), [], set()
    for t, cohort in enumerate(cohorts):
        for client in sorted(cohort.tolist()):
            if method.mask_per == "round" or client not in received:
                key = method.mask_key(state.secret_key, t, client)
                lengths.append(len(encode_proxy(apply(key, state.transform_state, prepared))))
            received.add(client)
    return lengths


@pytest.mark.usefixtures("quick_compilation")
def test_bytes_are_of_what_is_really_sent(model, data):
    """A mask that stays is sent once to each client, one of each round in every round."""
    held_out = HeldOut(data.examples, {})
    found = {}
    for mask_per in ("client", "round"):
        simulation = simulation_of(model, data, mask_per=mask_per, participation__dropout=0.4)
        state, entries = initial_state(simulation, model.params), []
        cohorts = [
            np.asarray(simulation.federation.cohort(state.replace(round=jnp.int32(t))))
            for t in range(5)
        ]
        for _, after, some in run_rounds(simulation, state, data, held_out):
            entries += some
            end = after
        assert [entry["clients/sent"] for entry in entries] == [
            len(set(cohort) - set(np.concatenate([[-1], *cohorts[:t]])))
            if mask_per == "client"
            else len(cohort)
            for t, cohort in enumerate(cohorts)
        ]
        lengths = lengths_of_payloads(simulation, model.params, cohorts)
        for t, entry in enumerate(entries):
            sent = sum(lengths[: sum(one["clients/sent"] for one in entries[: t + 1])])
            assert entry["bytes/down_per_client"] == pytest.approx(sent / (3 * (t + 1)), rel=1e-12)
        assert set(np.flatnonzero(end.broadcast.received)) == set(np.concatenate(cohorts))
        found[mask_per] = entries[-1]["bytes/down_per_client"]
    assert found["client"] < found["round"]


@pytest.mark.usefixtures("quick_compilation")
def test_attackers_of_masks_that_stay_know_their_members_columns(model, data):
    """However often they take part; the proxy view is of masks that clients really have."""
    federation = federate(model, FEDQSN, cohort=4, mask_per="client")
    state, run = fast(federation.init)(KEY, model.params), fast(federation.round)
    transform = FEDQSN.transform
    whole = whole_proxy(model.params, model.sites)
    prepared = fast(transform.prepare)(state.transform_state, whole)

    @fast
    @jax.vmap
    def masks_of(client):
        key = sticky_client_key(state.secret_key, client)
        return transform.apply(key, state.transform_state, prepared).visible

    masks, met = jax.device_get(masks_of(jnp.arange(POPULATION))), set()
    secret = state.secret_key
    for _ in range(6):
        met |= set(cohort_of(state).tolist())
        keys = jax.random.key_data(federation.proxy_keys(state)).tolist()
        of_clients = [
            jax.random.key_data(sticky_client_key(secret, c)).tolist() for c in range(POPULATION)
        ]
        assert len(keys) == 3
        assert all(key in of_clients for key in keys)
        state, _ = run(state, data)
        for attacker in state.attackers.values():
            members = sorted(met & set(np.asarray(attacker.members).tolist()))
            for path, known in attacker.known.items():
                expected = masks[path][members].any(axis=0)
                np.testing.assert_array_equal(known, expected)
    assert not np.asarray(state.attackers["attacker_1"].known["hidden_0/kernel"]).all()


@pytest.mark.usefixtures("quick_compilation")
def test_payloads_that_are_not_counted_are_not_told_of(model, data):
    """In other rounds than one-way ones everybody is sent a payload, and no count is told."""
    simulation = simulation_of(model, data, broadcast__every=1, mask_per="client")
    state = initial_state(simulation, model.params)
    rows = {name: each[:4] for name, each in data.examples.items()}
    state, result = simulation.run(state, data, rows, jnp.int32(1), jnp.int32(5))
    entry = entry_of(simulation, jax.device_get(result), 0, 0)
    assert "clients/sent" not in entry
    assert entry["bytes/down_per_client"] > 0
