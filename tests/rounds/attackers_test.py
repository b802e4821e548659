"""What colluding clients come to know in a run."""

import functools

import jax
import numpy as np
from rounds_cases import (
    KEY,
    TRANSFORM,
    cohort_of,
    double,
    simulated_proxies,
)

from fedqsn_jax.config.schema import Config
from fedqsn_jax.rounds.views import attacker_params
from fedqsn_jax.simulation.warnings import warnings_after_run


def test_attackers_know_what_they_have_received(model, data, shared):
    _, init, run, _ = shared
    state = init(KEY, model.params)
    members = {name: set(np.asarray(a.members).tolist()) for name, a in state.attackers.items()}
    assert members["attacker_1"] < members["attacker_4"]
    assert [len(ids) for ids in members.values()] == [1, 4]
    zeros = jax.tree.map(np.zeros_like, double(model.params))
    known = {
        name: {site.path: np.zeros((1, site.columns), bool) for site in model.sites}
        for name in members
    }
    copies = {name: jax.tree.map(np.array, zeros) for name in members}
    met = dict.fromkeys(members, 0)
    assert len(warnings_after_run(Config(), [{}], state.attackers)) == len(members)
    simulate = functools.partial(simulated_proxies, TRANSFORM, model)
    for _ in range(5):
        cohort, (proxies, server_visible) = cohort_of(state), simulate(state)
        for name, ids in members.items():
            for client_id in ids & set(cohort.tolist()):
                met[name] += 1
                values = proxies[client_id].params
                copies[name]["head"] = double(values["head"])
                for path, seen in proxies[client_id].visible.items():
                    known[name][path] |= seen
                    layer, now = path.partition("/")[0], seen[0]
                    copies[name][layer]["kernel"][:, now] = values[layer]["kernel"][:, now]
                    copies[name][layer]["bias"][now] = values[layer]["bias"][now]
        state, _ = run(state, data)
        for name, attacker in state.attackers.items():
            jax.tree.map(np.testing.assert_array_equal, attacker.known, known[name])
            jax.tree.map(np.testing.assert_array_equal, double(attacker.copy), copies[name])
            told = any(name in line for line in warnings_after_run(Config(), [{}], state.attackers))
            assert told == (met[name] == 0)
        for path, seen in server_visible.items():
            one, four = (np.asarray(a.known[path]) for a in state.attackers.values())
            assert not (one & ~four).any()
            assert not (four & ~np.asarray(seen)).any()
    assert 0 < met["attacker_1"] < met["attacker_4"]
    assert any(
        (np.asarray(state.attackers["attacker_4"].known[path]) & ~known["attacker_1"][path]).any()
        for path in known["attacker_1"]
    ), "four clients know more than one"

    attacker = state.attackers["attacker_1"]
    values = attacker_params(attacker, model.sites)
    for site in model.sites:
        layer, known_columns = site.path.partition("/")[0], np.asarray(attacker.known[site.path])
        for leaf in ("kernel", "bias"):
            expected = np.asarray(attacker.copy[layer][leaf]) / known_columns.mean()
            np.testing.assert_allclose(values[layer][leaf], expected, rtol=1e-5)
            assert not np.asarray(values[layer][leaf])[..., ~known_columns[0]].any()
    jax.tree.map(np.testing.assert_array_equal, values["head"], attacker.copy["head"])
