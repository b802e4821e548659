"""One contract for every method: it keeps invariants 2 to 5 and 8, or declares that it does not.

What is declared must be true as well: an algorithm that says that it leaks is caught leaking. Every
case is a configuration, composed as a run composes it; none may do what plain FedQSN does.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from language_cases import CONFIGS, VOCAB, random_params
from rounds_cases import KEY, POPULATION, fast, octets

from fedqsn_jax.cli.main import main
from fedqsn_jax.config.schema import (
    ALGORITHMS,
    SERVER_OPTIMIZERS,
    Config,
    resolve,
    to_dict,
    with_fields,
)
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import leaves_by_path, select
from fedqsn_jax.core.types import Params
from fedqsn_jax.data.population import ClientData, Splits, from_clients
from fedqsn_jax.generation.language_tasks import sequence_classification
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.problems.prompted import prompted_problem
from fedqsn_jax.protocol.algorithms import Promise
from fedqsn_jax.protocol.layout import Layout
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.quantization import Quantized
from fedqsn_jax.protocol.wire import decode_proxy, encode_proxy
from fedqsn_jax.simulation.compose import Simulation, make_simulation

COMMON = {
    "rounds": 3,
    "bits": 3,
    "block_size": 4,
    "p1": 0.3,
    "p2": 0.4,
    "cohort.size": 4,
    "client.batch_size": 4,
    "client.epochs": 2,
    "client.learning_rate": 0.2,
    "evaluation.attackers": (1, 4),
    "evaluation.proxy_samples": 2,
}
PLAIN = "fedqsn"
MASKED, QUANTIZED = ("fedsn", "fedqsn"), ("fedq", "fedqsn", "fedlpp")
UPLOADS = {"upload.bits": 2, "upload.block_size": 4, "upload.error_feedback": True}
PRIVATE = {"privacy.clip": 0.05, "privacy.noise": 0.5, "server.weighting": "uniform"}
PROMPTED = {
    "algorithm": "fedsp",
    "fedsp.prompts": 2,
    "fedsp.tuned": ("prompts", "classifier"),
    "fedsp.auxiliary_rate": 0.05,
    "pretraining.batch_size": 4,
    # It goes with texts only; these are made here.
    "data.name": "text",
    "data.task": "own",
    "data.train": "a file",
    "model.name": "language",
    "model.pretrained": "a directory",
}
CASES: dict[str, dict[str, Any]] = {
    **{name: {"algorithm": name} for name in ALGORITHMS if name not in ("fedlpp", "fedsp")},
    "fedlpp": {"algorithm": "fedlpp", "lora.rank": 3, "lora.alpha": 6.0},
    "fedqsn on adapters": {"lora.rank": 3, "lora.quantize": True},
    "fedprox": {"client.proximal": 0.5},
    "momentum": {"server.momentum": 0.9},
    **{
        name: {"server.optimizer": name, "server.learning_rate": 0.05}
        for name in SERVER_OPTIMIZERS
        if name != "sgd"
    },
    "coverage": {"server.normalize": "coverage"},
    "quantized uploads": UPLOADS,
    "every option at once": {
        **UPLOADS,
        "sampling": "fixed_count",
        "client.proximal": 0.5,
        "server.momentum": 0.9,
        "server.learning_rate": 0.5,
        "server.normalize": "coverage",
        "server.clip_norm": 0.05,
        "participation.dropout": 0.3,
        "participation.stragglers": 0.5,
        "participation.nan": 0.3,
    },
    # Clients' masks stay, and nothing that is learned is sent.
    "one-way": {"broadcast.every": 0, "mask_per": "client"},
    "one-way with everything": {
        **UPLOADS,
        "broadcast.every": 0,
        "server.scale": 2.0,
        "server.normalize": "coverage",
        "server.clip_norm": 0.05,
        "participation.dropout": 0.3,
    },
    "one-way adapters": {"algorithm": "fedlpp", "lora.rank": 3, "broadcast.every": 0},
    "traced": {"tracing_margin": 0.3},
    "traced one-way rounds": {"tracing_margin": 0.2, "broadcast.every": 0, "mask_per": "client"},
    "half is sent every second round": {"broadcast.every": 2, "broadcast.share": 0.5},
    "released": {
        "codebook": "symmetric_normal_float",
        "blocks": "row",
        "sampling": "fixed_count",
        "server.rule": "from_sent",
    },
    "private": {**PRIVATE, "server.normalize": "coverage", "server.optimizer": "lamb"},
    "private one-way rounds": {
        **PRIVATE,
        "cohort.sampling": "poisson",
        "broadcast.every": 0,
        "upload.bits": 2,
        "upload.block_size": 4,
    },
    # All of it; and its rounds alone, which tell nothing, though distillation before them does.
    "fedsp": {**PROMPTED, "fedsp.distillation_steps": 2},
    "fedsp's rounds": {**PROMPTED, "fedsp.distillation_steps": 0},
}


class Subject(NamedTuple):
    """A method on a model.

    Attributes:
      simulation: The method.
      params: The model's parameters, before the first round.
      data: The clients' rows.
      begin: What the server makes of the parameters, and what clients can tell of it.
      conceal: ``(tree, visible, value)``: a copy of a tree of parameters, with a value that is
        made of this one wherever something is the server's secret for good.
      leaks: Whether that is declared to show.
    """

    simulation: Simulation
    params: Params
    data: ClientData
    begin: Callable[[Params], Params]
    conceal: Callable[[Params, Any, float], Params]
    leaks: bool


def configured(name: str, changes: dict[str, Any]) -> Config:
    values = COMMON | CASES[name] | {key.replace("__", "."): v for key, v in changes.items()}
    return resolve(to_dict(with_fields(Config(), values)))


@pytest.fixture(scope="module")
def subject_of(model, data, set_hidden):
    """``(name, **changes) -> Subject`` of a case, with other values of some settings."""

    def conceal(sites):
        def of(tree, visible, value):
            paths = leaves_by_path(tree)
            return set_hidden(tree, [s for s in sites if s.path in paths], visible, value)

        return of

    def make(name, **changes):
        config = configured(name, changes)
        if config.algorithm == "fedsp":
            return prompted_subject(config)
        simulation = make_simulation(config, model.apply_fn, classification(), model.params, data)
        return Subject(
            simulation,
            model.params,
            data,
            lambda params: params,
            conceal(simulation.sites),
            Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES in simulation.algorithm.broken_promises,
        )

    return make


def prompted_subject(config: Config) -> Subject:
    """FedSP on a tiny encoder, of which everything but the classifier is secret."""
    rng = np.random.default_rng(1)

    def rows(count):
        tokens = rng.integers(0, VOCAB, (count, 5)).astype(np.int32)
        return {"tokens": tokens, "label": tokens[:, 1] % 3}

    data = from_clients([rows(count) for count in (5, 0, 12, 3, 7, 1, 9, 4)])
    private = {name: jnp.asarray(array) for name, array in rows(8).items()}
    architecture = CONFIGS["bert"].with_dropout(0.0)
    problem = prompted_problem(
        problem_settings(config),
        config.fedsp,
        Splits(data, private, private, 3),
        architecture,
        random_params(architecture),
        Execution(),
        sequence_classification(),
    )
    other = {"model": random_params(architecture, seed=2)}
    other["model"].pop("classifier")

    def conceal(tree, visible, value):
        return {**tree, "model": jax.tree.map(lambda leaf: leaf * value, other["model"])}

    simulation = make_simulation(
        config, problem.apply_fn, problem.task, problem.params, data, problem.client_apply
    )
    if not config.fedsp.distillation_steps:
        return Subject(simulation, problem.params, data, lambda params: params, conceal, False)
    finish = fast(functools.partial(problem.preparation.finish, config.pretraining))
    leaks = Promise.NOTHING_SENT_DEPENDS_ON_HIDDEN_VALUES in simulation.algorithm.broken_promises
    return Subject(
        simulation, problem.params, data, lambda p: finish(KEY, p, private), conceal, leaks
    )


@pytest.fixture(scope="module")
def plain(subject_of) -> np.ndarray:
    """What two rounds of FedQSN with nothing else make of what is not hidden."""
    subject = subject_of(PLAIN)
    federation = subject.simulation.federation
    state, run = fast(federation.init)(KEY, subject.params), fast(federation.round)
    for _ in range(2):
        state, _ = run(state, subject.data)
    return flat(subject.conceal(state.params, federation.prepare(state).visible, 0.0))


def flat(tree: Params) -> np.ndarray:
    """Every entry of every tensor in one vector."""
    return np.concatenate([np.asarray(leaf).reshape(-1) for leaf in jax.tree.leaves(tree)])


@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", CASES)
def test_hidden_values_neither_change_nor_show(name, subject_of, plain):
    """Invariants 2, 3, 4 and 8, over two rounds and every client's payload of the third."""
    subject = subject_of(name)
    simulation, conceal = subject.simulation, subject.conceal
    algorithm, sites = simulation.algorithm, simulation.sites
    federation, transform = simulation.federation, algorithm.transform
    init, run = fast(federation.init), fast(federation.round)
    prepare = fast(transform.prepare)

    @fast
    def apply(state, prepared, client_id):
        return simulation.method.proxy_of(
            client_id,
            prepared,
            secret_key=state.secret_key,
            round_index=state.round,
            transform_state=state.transform_state,
        )

    def prepared_of(state):
        model = simulation.method.broadcast.sent(state.broadcast, state.params)
        whole = whole_proxy(select(model, simulation.roles.sent), sites)
        return prepare(state.transform_state, whole)

    visible = prepared_of(init(KEY, subject.params)).visible
    hides = any(not np.asarray(seen).all() for seen in visible.values())
    assert hides == (simulation.config.algorithm in MASKED)

    def told(value):
        """Everything but hidden values that rounds make, and what clients receive after them."""
        state = init(KEY, subject.begin(conceal(subject.params, visible, value)))
        # Adapters are there only now.
        state = state.replace(params=conceal(state.params, visible, value))
        start, facts = state.params, []
        for _ in range(2):
            state, of_round = run(state, subject.data)
            facts.append(of_round)
        marks = conceal(jax.tree.map(jnp.zeros_like, start), visible, 1.0)
        kept = True
        for path, hidden in leaves_by_path(marks).items():
            hidden = np.asarray(hidden) != 0
            before, now = (np.asarray(leaves_by_path(tree)[path]) for tree in (start, state.params))
            returned = is_returned(simulation.config, path)
            kept &= now[hidden].tobytes() == before[hidden].tobytes()
            assert (now[~hidden] != before[~hidden]).any() == returned, path
        prepared, payloads = prepared_of(state), []
        for client_id in range(POPULATION):
            proxy = apply(state, prepared, client_id)
            payloads.append(encode_proxy(proxy))
            counts = {path: int(np.sum(seen)) for path, seen in proxy.visible.items()}
            assert len(payloads[-1]) == simulation.traffic.down.of(counts)
            decoded = decode_proxy(payloads[-1], Layout.of(proxy))
            assert octets(decoded) == octets(proxy)
            check_what_travels(simulation, decoded)
            values = dequantize_proxy(decoded).params
            if proxy.visible:
                blank = conceal(values, proxy.visible, 0.0)
                jax.tree.map(np.testing.assert_array_equal, values, blank)
        sent_before = {
            name: conceal(model, visible, 0.0)
            for name in ("first", "latest")
            if (model := getattr(state.broadcast, name)) is not None
        }
        state = state.replace(
            params=conceal(state.params, visible, 0.0),
            broadcast=state.broadcast.replace(**sent_before),
        )
        return kept, flat(state.params), (octets(state), octets(facts), payloads)

    # A value that is no number would spread; those that leak are told apart by finite ones.
    (kept, _, first), (also_kept, after, second) = map(told, (9.0 if subject.leaks else np.nan, -2))
    assert (kept and also_kept) == (
        Promise.HIDDEN_VALUES_NEVER_CHANGE not in algorithm.broken_promises
    )
    assert (first == second) == (not subject.leaks)
    assert run._cache_size() == 1, "two rounds of two runs are one program"
    same = after.shape == plain.shape and np.allclose(after, plain, rtol=1e-3, atol=1e-4)
    assert same == (name == PLAIN), "another method, which does something else"


def is_returned(config, path):
    """Whether clients change a tensor of the server's: what it has for them, and no more."""
    if config.algorithm == "fedsp":
        return path.partition("/")[0] in config.fedsp.tuned
    return not config.lora.rank or path.endswith(("_lora_a", "_lora_b"))


def check_what_travels(simulation, proxy):
    """Codes exactly where they are declared, and of a public or withheld model nothing."""
    name, leaves = simulation.config.algorithm, {}

    def visit(path, leaf):
        leaves["/".join(key.key for key in path)] = leaf

    jax.tree_util.tree_map_with_path(
        visit, proxy.params, is_leaf=lambda leaf: isinstance(leaf, Quantized)
    )
    codes = {path for path, leaf in leaves.items() if isinstance(leaf, Quantized)}
    quantized = {site.path for site in simulation.sites if site.quantized}
    assert codes == (quantized if name in QUANTIZED else set())
    if name == "fedlpp":
        assert codes == set(leaves), "adapters alone"
        assert all(path.endswith(("_lora_a", "_lora_b")) for path in leaves)
        # One block after the other through a whole tensor, not column by column.
        assert all(site.columns == 1 for site in simulation.sites)
    if name == "fedsp":
        assert {path.partition("/")[0] for path in leaves} == {"auxiliary", "prompts", "classifier"}


# The two that train other tensors than the server has, which tests of the client axis lack.
@pytest.mark.usefixtures("quick_compilation")
@pytest.mark.parametrize("name", ["fedlpp", "fedsp's rounds"])
def test_clients_side_by_side_give_the_round_of_one_by_one(name, subject_of):
    """Invariant 5: to 1e-5 of each tensor's change."""

    def change(**changes):
        subject = subject_of(name, **changes)
        federation = subject.simulation.federation
        state = fast(federation.init)(KEY, subject.params)
        after, _ = fast(federation.round)(state, subject.data)
        chunk = subject.simulation.choice.axis.chunk_size
        pairs = leaves_by_path(state.params), leaves_by_path(after.params)
        return chunk, {path: np.asarray(pairs[1][path]) - leaf for path, leaf in pairs[0].items()}

    (one, alone), (three, together) = (
        change(cohort__parallelism="scan"),
        change(cohort__parallelism="vmap", cohort__chunk_size=3),
    )
    assert (one, three) == (1, 3)
    for path, expected in alone.items():
        distance = np.linalg.norm(together[path] - expected)
        assert distance <= 1e-5 * np.linalg.norm(expected), path


def test_a_run_that_leaks_says_so(capsys):
    assert main(["--config=configs/digits.py:released", "--dry_run"]) == 0
    shown = " ".join("".join(capsys.readouterr()).split())
    assert "does not keep what this package promises elsewhere: what clients receive tells" in shown
    assert "5-bit SymmetricNormalFloat" in shown
    assert main(["--config=configs/digits.py:released", "--dry_run", "--config.bits=8"]) == 2
    assert "bits = 8: allowed is at most 7 with codebook" in capsys.readouterr().err
