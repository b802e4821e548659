"""One contract for every algorithm: it keeps the invariants 2 to 4, or declares that it does not.

What is declared must be true as well: an algorithm that says that it leaks is caught leaking.
"""

import jax
import numpy as np
import optax
import pytest
from rounds_cases import KEY, POPULATION, fast, federate, octets

from fedqsn_jax.algorithms import Algorithm, fedqsn, make_algorithm
from fedqsn_jax.config import ALGORITHMS
from fedqsn_jax.layout import Layout
from fedqsn_jax.main import main
from fedqsn_jax.masking import leaves_by_path
from fedqsn_jax.participation import Participation
from fedqsn_jax.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.quantization import NormalFloat, SymmetricNormalFloat
from fedqsn_jax.randomness import client_round_key
from fedqsn_jax.traffic import measure_traffic
from fedqsn_jax.upload import quantized_upload
from fedqsn_jax.wire import decode_proxy, encode_proxy

QUANTIZER = NormalFloat(3, 4)
MASKS = {"p1": 0.3, "p2": 0.4}
CASES = {
    # FedSP hides no columns but a whole model: its contract is in fedsp_test.
    **{
        name: (make_algorithm(name, QUANTIZER, 0.3, 0.4), {})
        for name in ALGORITHMS
        if name != "fedsp"
    },
    "every option at once": (
        fedqsn(QUANTIZER, **MASKS, sampling="fixed_count"),
        {
            "server": optax.sgd(0.5, 0.9),
            "normalize": "coverage",
            "clip_norm": 0.05,
            "participation": Participation(dropout=0.3, stragglers=0.5, nan=0.3),
            "feedback": True,
        },
    ),
    "released": (fedqsn(SymmetricNormalFloat(3, 4, blocks_along="row"), **MASKS), {}),
}


@pytest.fixture(scope="module", params=CASES)
def case(request, model) -> tuple[Algorithm, dict]:
    algorithm, options = CASES[request.param]
    options = dict(options)
    if options.pop("feedback", False):
        options["upload"] = quantized_upload(NormalFloat(2, 4), model.sites, feedback=True)
    return algorithm, options


@pytest.mark.usefixtures("quick_compilation")
def test_hidden_values_neither_change_nor_show(case, model, data, set_hidden):
    """Invariants 2, 3 and 4, over two rounds and every client's payload of the third."""
    algorithm, options = case
    transform = algorithm.transform
    federation = federate(model, algorithm, **options)
    init, run = fast(federation.init), fast(federation.round)
    prepare, apply = fast(transform.prepare), fast(transform.apply)
    transform_state = init(KEY, model.params).transform_state
    visible = prepare(transform_state, whole_proxy(model.params, model.sites)).visible
    cost = measure_traffic(transform, model.params, model.sites).down
    assert any(not np.asarray(seen).all() for seen in visible.values()) == (algorithm.p1 > 0)

    def told(value):
        """Everything but hidden values that rounds make, and what clients receive after them."""
        start = set_hidden(model.params, model.sites, visible, value)
        state, facts = init(KEY, start), []
        for _ in range(2):
            state, of_round = run(state, data)
            facts.append(of_round)
        kept = True
        for path, leaf in leaves_by_path(start).items():
            seen = np.asarray(visible.get(path.partition("/")[0] + "/kernel", True)).reshape(-1)
            hidden = np.broadcast_to(~seen, leaf.shape)
            now = np.asarray(leaves_by_path(state.params)[path])
            kept &= now[hidden].tobytes() == np.asarray(leaf)[hidden].tobytes()
            assert (now[~hidden] != np.asarray(leaf)[~hidden]).any()
        prepared = prepare(transform_state, whole_proxy(state.params, model.sites))
        payloads = []
        for client_id in range(POPULATION):
            key = client_round_key(state.secret_key, state.round, client_id)
            proxy = apply(key, transform_state, prepared)
            payloads.append(encode_proxy(proxy))
            counts = {path: int(np.sum(seen)) for path, seen in proxy.visible.items()}
            assert len(payloads[-1]) == cost.of(counts)
            decoded = decode_proxy(payloads[-1], Layout.of(proxy))
            assert octets(decoded) == octets(proxy)
            values = dequantize_proxy(decoded).params
            blank = set_hidden(values, model.sites, proxy.visible, 0.0)
            jax.tree.map(np.testing.assert_array_equal, values, blank)
        state = state.replace(params=set_hidden(state.params, model.sites, visible, 0.0))
        return kept, (octets(state), octets(facts), payloads)

    # A value that is no number would spread; those that leak are told apart by finite ones.
    (kept, first), (also_kept, second) = map(
        told, (9.0 if algorithm.leaks_hidden else np.nan, -2.0)
    )
    assert (kept and also_kept) == (2 not in algorithm.unmet_invariants)
    assert (first == second) == (not algorithm.leaks_hidden)


def test_a_run_that_leaks_says_so(capsys):
    assert main(["--config=configs/digits.py:released", "--dry_run"]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "does not keep what this package promises elsewhere: what clients receive tells" in shown
    assert "5-bit SymmetricNormalFloat" in shown
    assert main(["--config=configs/digits.py:released", "--dry_run", "--config.bits=8"]) == 2
    assert "bits = 8: allowed is at most 7 with codebook" in capsys.readouterr().err
