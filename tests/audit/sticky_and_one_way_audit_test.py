"""Audits of runs whose clients keep their masks, or are rarely or never sent what was learned."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import fedqsn_jax
from fedqsn_jax.audit.case import case_of_model, case_of_run
from fedqsn_jax.audit.page import finding_texts
from fedqsn_jax.audit.playing import play
from fedqsn_jax.audit.received import Payloads, expected_bytes, hold
from fedqsn_jax.audit.replay import (
    make_client_proxy,
    members_by_round,
    payload_layout,
    payloads_by_round,
    replay,
)
from fedqsn_jax.audit.report import make_report
from fedqsn_jax.audit.subtraction import largest_change
from fedqsn_jax.config.schema import resolve
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.wire import encode_proxy
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.rounds.views import attacker_params
from fedqsn_jax.runs import experiment

SETTINGS = {
    "rounds": 4,
    "data": {"name": "digits", "clients": 4, "private_rows": 40, "test_rows": 60,
             "train_rows": 220},
    "model": {"name": "mlp", "hidden": (12,)},
    "pretraining": {"steps": 20, "batch_size": 16, "learning_rate": 0.1},
    "cohort": {"size": 3},
    "client": {"steps": 3, "batch_size": 8, "learning_rate": 0.1},
    "evaluation": {"attackers": (1, 2), "proxy_samples": 2, "every": 2},
    "checkpoint": {"every": 4},
}  # fmt: skip
RUNS = {
    "sticky": {"mask_per": "client"},
    "one-way": {"broadcast": {"every": 0}, "server": {"scale": 1.5}},
    # The scale is chosen on rows that the server keeps from its own training.
    "sticky, one-way, scale chosen": {
        "mask_per": "client",
        "broadcast": {"every": 0},
        "server": {"scale": 0, "validation_rows": 15},
    },
    "half of it every other round": {"broadcast": {"every": 2, "share": 0.5}},
}


@pytest.fixture(scope="module", params=RUNS)
def case(request, tmp_path_factory):
    path = tmp_path_factory.mktemp("audited") / "run"
    experiment.run(resolve({**SETTINGS, **RUNS[request.param]}), path, silent_display())
    return case_of_run(path)


def test_the_replay_is_the_run_and_its_union_the_runs_own_attacker(case, tmp_path):
    payloads = Payloads(tmp_path)
    theirs = case.final.attackers["attacker_2"]
    members = [int(k) for k in theirs.members]
    replayed = replay(case, members, payloads.keep, lambda _: None)
    assert replayed.difference == 0
    held = hold(
        payloads.read(payload_layout(case), members),
        members,
        case.sent(case.final.params),
        case.sites,
    )
    jax.tree.map(np.testing.assert_array_equal, held.union.known, theirs.known)
    jax.tree.map(
        lambda ours, own: np.testing.assert_allclose(ours, own, atol=1e-6),
        attacker_params(held.union, case.sites),
        attacker_params(theirs, case.sites),
    )
    one_way = case.config.broadcast.every == 0
    sticky = case.config.mask_per == "client"
    found = {}
    for index, client, _ in payloads.read(payload_layout(case), members):
        name = f"round_{index:06}_client_{client:06}.proxy"
        found.setdefault(client, []).append((tmp_path / name).read_bytes())
    assert set(found) == set(members)
    rounds = members_by_round(case, members)
    once = one_way and sticky
    for client, copies in found.items():
        assert len(copies) == (1 if once else sum(client in own for own in rounds.values()))
        # The state after the last round would send the same again only in such runs.
        proxy = make_client_proxy(case)(case.final, jnp.int32(client))
        assert (encode_proxy(jax.device_get(proxy)) == copies[0]) == once
    count = sum(map(len, found.values()))
    sizes = [len(copy) for copies in found.values() for copy in copies]
    assert count == sum(map(len, payloads_by_round(case, members).values()))
    assert expected_bytes(case, count) == pytest.approx(sum(sizes), rel=0.3)


def test_in_one_way_rounds_nothing_is_learned_of_the_others(case, tmp_path):
    settings = fedqsn_jax.AuditSettings(
        colluders=(2,), queries=(), rates=(1e-2,), steps=4, shadows=0
    )
    results = play(case, settings, tmp_path, silent_display())
    assert results.replay_difference == 0
    found = results.findings["2"]["subtraction"]
    config = case.config
    if config.broadcast.every == 0:
        assert found["learned"] is False
        assert found["largest_change"] == 0
        assert "nothing is learned" in finding_texts({"subtraction": found})["subtraction"]
    elif config.broadcast.every == 2:
        assert "not_played" in found
    else:
        assert abs(found["cosine"]) <= 1
        assert found["compared"] > 0
    text = " ".join(make_report(case, settings, results)["conclusions"])
    assert ("Let each client see the same columns" in text) <= (config.mask_per == "round")
    assert ("is sent back to clients" in text) <= (config.broadcast.every > 0)


def test_the_largest_change_is_that_of_what_two_proxies_show(model):
    site = model.sites[0]
    first = whole_proxy(model.params, model.sites)
    moved = jax.tree.map(jnp.copy, model.params)
    layer = site.path.partition("/")[0]
    moved[layer]["kernel"] = moved[layer]["kernel"].at[0, 3].add(0.25).at[0, 5].add(9.0)
    second = dequantize_proxy(whole_proxy(moved, model.sites)).replace(
        visible={site.path: jnp.arange(site.columns)[None] < 4}
    )
    assert largest_change([first]) == 0
    assert largest_change([first, first]) == 0
    assert largest_change([first, second]) == pytest.approx(0.25)


def test_own_models_whose_scale_is_chosen(model):
    generator = np.random.default_rng(0)

    def rows(count):
        x = generator.normal(size=(count, 6)).astype(np.float32)
        return {"x": x, "label": (x[:, 0] > 0).astype(np.int32)}

    clients, test, private = [rows(9) for _ in range(4)], rows(30), rows(30)
    result = fedqsn_jax.federate(
        (model.apply_fn, model.params), clients, test, private=private, rounds=2,
        cohort={"size": 2}, client={"steps": 2, "batch_size": 4}, broadcast={"every": 0},
        server={"scale": 0, "validation_rows": 12}, pretraining={"steps": 3, "batch_size": 4},
        site_rules=("head/kernel: none",),
    )  # fmt: skip
    own = fedqsn_jax.OwnModel(model.apply_fn, model.params, clients, test, private)
    made = case_of_model(result.simulation, result.state, own)
    assert len(made.held_out.validation["x"]) == 12
    replayed = replay(made, [0], lambda *payload: None, lambda done: None)
    assert replayed.difference == 0
