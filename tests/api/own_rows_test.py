"""What `federate` makes of rows, models and tasks that are not as it needs them: one line each."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx

from fedqsn_jax import HostData, Task, classification, federate
from fedqsn_jax.api.own_rows import read_clients
from fedqsn_jax.config.schema import Config, with_fields
from fedqsn_jax.data.labels import check_labels
from fedqsn_jax.models.functional import linen_init
from fedqsn_jax.simulation.warnings import DIVERGED, NO_NUMBER, warnings_after_run

CLASSES = 3
SHORT = {"rounds": 2, "client": {"steps": 1}, "evaluation": {"proxy_samples": 2}}


class Classifier(nn.Module):
    @nn.compact
    def __call__(self, x):
        return nn.Dense(CLASSES)(nn.relu(nn.Dense(8)(x)))


def rows(count, label=0):
    x = np.random.default_rng(count).normal(size=(count, 4)).astype(np.float32)
    return {"image": x, "label": (np.arange(count) % CLASSES + label).astype(np.int32)}


def renamed(arrays, **names):
    return {names.get(name, name): array for name, array in arrays.items()}


@pytest.fixture
def only_shapes(monkeypatch):
    """Initial parameters may be traced for their shapes; values may not be asked for."""

    def initial(*arguments):
        params = linen_init(*arguments)
        traced = all(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(params))
        return params if traced else refuse()

    def refuse(*arguments):
        raise AssertionError("it was not refused")

    monkeypatch.setattr("fedqsn_jax.api.own_function.linen_init", initial)
    monkeypatch.setattr("fedqsn_jax.api.own_model.find_heads", refuse)


def refusal(model=None, clients=None, test=None, **options):
    clients = [rows(5), rows(8)] if clients is None else clients
    with pytest.raises(ValueError, match=r".") as error:
        federate(model or Classifier(), clients, test or rows(9), **SHORT, **options)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize(
    ("clients", "message"),
    [
        ([], "no clients: at least one is needed"),
        ({0: rows(3)}, "clients: of type dict; allowed is a list"),
        (7, "clients: of type int; allowed is a list"),
        ([tuple(rows(3).values())], "client 0: of type tuple; allowed is a dictionary of arrays"),
        ([rows(3), None], "client 1: of type NoneType; allowed"),
        ([{0: np.ones(3), "label": np.ones(3)}], "client 0: an array is called 0; allowed"),
        ([{}], "client 0: an empty dictionary; allowed"),
        ([rows(0), rows(0)], "none of the 2 has a row"),
        ([{**rows(3), "label": 1}], "client 0: 'label' is a scalar"),
        ([{**rows(2), "image": [[1], [1, 2]]}], "client 0: 'image' cannot be made an array"),
        ([{**rows(2), "image": ["a", "b"]}], "client 0: 'image' is of dtype <U1; allowed"),
        ([rows(3), {**rows(3), "label": rows(4)["label"]}], "client 1: its arrays differ"),
        ([rows(3), {"image": rows(3)["image"]}], "client 1 has arrays ['image'], client 0 has"),
        ([rows(3), {**rows(3), "image": np.ones((3, 5))}], "client 1: 'image' is float64[5]"),
    ],
)
def test_rows_of_another_format_are_refused(clients, message):
    assert message in refusal(clients=clients)


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize("label", [np.eye(CLASSES), np.ones(CLASSES), np.ones(CLASSES, bool)])
def test_labels_of_classification_are_integers(label):
    each = {**rows(CLASSES), "label": label}
    message = refusal(clients=[each], test=each)
    kind = f"{label.dtype}{list(label.shape[1:])}"
    assert message == f"clients: 'label' is {kind} a row; allowed is an integer, 0 to 2"


@pytest.mark.usefixtures("only_shapes")
def test_names_that_are_read_must_be_there():
    named = [renamed(rows(n), image="x", label="y") for n in (5, 8)]
    test = renamed(rows(9), image="x", label="y")
    assert refusal(clients=named, test=test) == (
        "inputs = 'image': the model's input; allowed is one of the rows' x, y"
    )
    message = refusal(clients=named, test=test, inputs="x")
    assert message.startswith("task: its labels are called 'label'; allowed is one of the rows' x,")
    reads_z = classification("x")._replace(
        loss=lambda outputs, batch, valid: batch["z"], label=None
    )
    message = refusal(clients=named, test=test, inputs="x", task=reads_z)
    assert message == "task: there is no 'z' in a batch, which has x, y"
    params = {"head": {"kernel": jnp.ones((4, CLASSES))}}
    message = refusal((lambda p, batch, key: batch["pixels"], params))
    assert message.startswith("model: there is no 'pixels' in its parameters, or in a batch")


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize(
    ("model", "message"),
    [
        ((lambda p, x: x, {}), "model: apply_fn takes (p, x); allowed is (params, batch, key)"),
        (Classifier, "model: the class Classifier; allowed are an instance"),
        ("mlp", "model: of type str; allowed are"),
        (({}, lambda p, batch, key: p), "model: of type tuple; allowed are"),
        ((lambda p, b, k: (b["image"], 1), {}), "model: it returns a value of type tuple"),
        ((lambda p, b, k: b["image"].astype(int), {}), "model: its outputs are int32, through"),
        ((lambda p, b, k: b["image"] * 1j, {}), "model: its outputs are complex64, through"),
        (
            (lambda p, b, k: b @ p["w"], {"w": jnp.ones(4)}),
            "with image, label, without a key",
        ),
        ((lambda p, b, k: jax.random.fold_in(k, 0), {}), "without a key, as in evaluation: "),
        ((lambda p, b, k: b["image"].sum(-1), {}), "model: its outputs have the shape [1]"),
    ],
)
def test_models_of_another_form_are_refused(model, message):
    assert message in refusal(model)


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"task": "mnist"}, "task: of type str; allowed is a Task"),
        ({"on_progress": 3}, "on_progress: of type int; allowed is a function"),
        # An empty path would be the current directory.
        ({"workdir": ""}, "workdir = '': allowed is the path of a directory, or None"),
        ({"workdir": 5}, "workdir = 5: allowed is the path of a directory, or None"),
    ],
)
def test_what_is_used_late_is_looked_at_first(options, message):
    assert refusal(**options).startswith(message)


def test_numbers_that_the_device_cannot_hold_are_told_once():
    """Not also by NumPy, in a warning of its own, which here would be an error."""
    wide = {**rows(5), "image": rows(5)["image"].astype(np.float64) * 1e300}
    message = refusal(clients=[wide], test=wide)
    assert message.startswith("clients: 'image' has the value")
    assert "which float32 cannot hold" in message


def test_a_head_alone_has_nothing_to_hide():
    message = refusal(nn.Dense(CLASSES))
    assert message == (
        "algorithm = 'fedqsn': the model has no layer but the task head (kernel), which is never "
        "hidden; allowed is algorithm = 'fedavg', or a model with other layers"
    )


@pytest.mark.usefixtures("only_shapes")
def test_other_rows_must_be_like_the_clients():
    for where in ("test", "private"):
        for arrays, message in (
            (rows(0), f"{where} has no rows"),
            (tuple(rows(3).values()), f"{where}: of type tuple; allowed is a dictionary"),
            ({"image": rows(3)["image"]}, f"{where} has arrays image; allowed are the clients'"),
            ({**rows(3), "label": np.ones(3, np.uint8)}, f"{where}: 'label' is uint8[] a row"),
        ):
            assert message in refusal(**{"test": rows(9), where: arrays})


@pytest.mark.usefixtures("only_shapes")
@pytest.mark.parametrize("kind", ["linen", "nnx", "function"])
def test_labels_out_of_range_are_refused(kind):
    """One client's are too large by five: that is 5, 6, 7, 5, ... in all of its rows."""
    clients = [rows(5), rows(0), rows(8, label=5), rows(4)]
    wide = {"head": {"kernel": jnp.ones((4, CLASSES))}}
    model = {
        "linen": Classifier(),
        "nnx": nnx.Linear(4, CLASSES, rngs=nnx.Rngs(0)),
        "function": (lambda p, batch, key: batch["image"] @ p["head"]["kernel"], wide),
    }[kind]
    assert refusal(model, clients) == (
        "client 2: 8 of 8 rows have a label that is no class, such as 'label' = 5; allowed are "
        "0 to 2"
    )
    clients[2] = rows(8)
    clients[3]["label"][2:] = -1
    assert refusal(model, clients) == (
        "client 3: 2 of 4 rows have a label that is no class, such as 'label' = -1; allowed are "
        "0 to 2"
    )
    for where in ("test", "private"):
        wrong = rows(6)
        wrong["label"][4] = CLASSES
        message = refusal(model, **{"test": rows(9), where: wrong})
        assert message.startswith(f"{where}: 1 of 6 rows have a label that is no class, such as")


def test_labels_of_joined_clients_and_of_a_wide_dtype():
    """A label that int32 would wrap to a class; and a row before the first client's, nobody's."""
    arrays = {"image": np.ones((6, 4), np.float32), "label": np.zeros(6, np.int64)}
    arrays["label"][[0, 4]] = 99, 2**32 + 1
    test = {**rows(9), "label": np.zeros(9, np.int64)}
    message = refusal(clients=HostData(arrays, np.array([1, 3, 3, 6])), test=test)
    assert message.startswith("client 2: 1 of 3 rows have a label that is no class, such as 'label")
    assert "= 4294967297" in message


@pytest.mark.parametrize("offsets", [[0, 7], [0, 4, 3], [3], [[0, 6]], [0.0, 6.0], [-1, 6]])
def test_offsets_that_do_not_fit_are_refused(offsets):
    with pytest.raises(ValueError, match=r"HostData\.offsets"):
        read_clients(HostData(rows(6), np.array(offsets)))


@pytest.mark.parametrize("classes", [1, 3, 200])
def test_every_class_is_a_label_and_nothing_else_is(classes):
    check_labels(np.arange(classes), classes, "rows")
    check_labels(np.arange(classes, dtype=np.uint8), classes, "rows")
    for wrong in (-1, classes):
        with pytest.raises(ValueError, match=f"rows: 1 of 2 rows .* = {wrong}; allowed are 0 to"):
            check_labels(np.array([0, wrong]), classes, "rows")


@pytest.mark.usefixtures("only_shapes")
def test_a_task_of_ones_own_may_have_any_labels():
    plain = classification()
    task = Task(plain.loss, plain.statistics, plain.summarize, plain.score)
    with pytest.raises(AssertionError, match="not refused"):
        federate(Classifier(), [rows(5, label=5)], rows(9, label=-7), task=task, **SHORT)


@pytest.mark.usefixtures("quick_compilation")
def test_clients_that_are_rejected_are_told_at_the_end():
    """Of two clients that always take part one has an image that is NaN."""
    clients = [rows(5), rows(8)]
    clients[1]["image"][3] = np.nan
    expected = "2 clients' updates were rejected because they were not finite, in 2 of the 2 rounds"
    full = {**SHORT, "client": {"steps": 0, "epochs": 1}}
    with pytest.warns(UserWarning, match=expected):
        result = federate(Classifier(), clients, rows(9), **full)
    assert [entry.get("clients/rejected") for entry in result.history] == [None, 1, 1]
    # Faults that are asked for are no surprise.
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        federate(Classifier(), clients, rows(9), participation={"nan": 0.5}, **full)


def test_rejected_updates_are_counted_in_the_rounds_that_say():
    """By hand: 3 + 1 updates in two of the four rounds after round 0."""
    history = [{"round": 0}] + [
        {"round": number, "clients/rejected": count}
        for number, count in ((5, 3), (10, 0), (15, 1), (20, 0))
    ]
    (line,) = warnings_after_run(Config(), history, {})
    assert line.startswith("4 clients' updates were rejected")
    assert "in 2 of the 4 rounds that were evaluated" in line
    assert warnings_after_run(with_fields(Config(), {"participation.nan": 0.1}), history, {}) == []
    assert warnings_after_run(Config(), [history[0], history[2]], {}) == []
    diverged = [history[0], {"round": 20, "clients/rejected": 0, "global/loss": float("nan")}]
    assert warnings_after_run(Config(), diverged, {}) == [DIVERGED]
    # As with a NaN among the test rows.
    from_the_start = [{"round": 0, "global/loss": float("nan")}, diverged[-1]]
    assert warnings_after_run(Config(), from_the_start, {}) == [NO_NUMBER]


@pytest.mark.usefixtures("only_shapes")
def test_settings_without_effect_are_told():
    chosen = {"algorithm": "fedavg", "p1": 0.5, "p2": 0.2, "bits": 3}
    options = {**SHORT, **chosen, "client": {"steps": 5, "epochs": 3}}
    with (
        pytest.warns(UserWarning, match="no effect") as told,
        pytest.raises(AssertionError, match="not refused"),
    ):
        federate(Classifier(), [rows(5), rows(8)], rows(9), **options)
    # 0.2 is the default: it says nothing about what the user meant.
    assert [str(each.message) for each in told] == [
        "p1 = 0.5 has no effect with algorithm = 'fedavg'",
        "bits = 3 has no effect with algorithm = 'fedavg'",
        "client.epochs = 3 has no effect with client.steps = 5",
    ]


@pytest.mark.usefixtures("only_shapes")
def test_promises_that_are_not_kept_are_told():
    with (
        pytest.warns(UserWarning, match=r"^fedqsn with blocks = 'row' does not keep what .* tells"),
        pytest.raises(AssertionError, match="not refused"),
    ):
        federate(Classifier(), [rows(5), rows(8)], rows(9), blocks="row", p1=0.2, **SHORT)


def test_jax_arrays_are_rows_too():
    data = read_clients([jax.tree.map(jnp.asarray, rows(3)), {**rows(2)}])
    assert data.clients == 2
    np.testing.assert_array_equal(data.offsets, [0, 3, 5])
    halves = {"image": jnp.ones((2, 4), jnp.bfloat16), "label": jnp.zeros(2, bool)}
    assert read_clients([halves]).examples["image"].dtype == jnp.bfloat16
