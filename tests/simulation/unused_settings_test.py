"""Settings without effect are known, and said."""

import dataclasses
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fedqsn_jax.config.choices import ALGORITHMS, CLASSIFICATION
from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.config.schema import MODELS, Config, ModelConfig, with_fields
from fedqsn_jax.data.text.formats import FORMATS
from fedqsn_jax.data.text.loading import TextSettings
from fedqsn_jax.simulation.from_config import algorithm_of
from fedqsn_jax.simulation.unused_settings import (
    as_used,
    ignored_settings,
    unused_fields,
    without_effect,
)


def test_settings_that_are_ignored_are_told():
    values = {"model.name": "cnn", "model.hidden": (8,), "model.dense": 7, "data.task": "sst2"}
    assert ignored_settings(with_fields(Config(), values)) == [
        "data.task = 'sst2' has no effect with data.name = 'digits'",
        "model.hidden = (8,) has no effect with model.name = 'cnn'",
    ]
    assert ignored_settings(Config()) == []
    skewed = with_fields(Config(), {"data.partition": "iid", "data.alpha": 2.0, "bits": 3})
    assert ignored_settings(skewed) == [
        "data.alpha = 2.0 has no effect with data.partition = 'iid'"
    ]


def test_every_field_of_a_model_belongs_to_one():
    """A field that is added to the configuration must be said to be some model's."""
    every = {f"model.{field.name}" for field in dataclasses.fields(ModelConfig)} - {"model.name"}
    owned = [
        name
        for model in MODELS
        for name in every - set(unused_fields(with_fields(Config(), {"model.name": model})))
    ]
    assert sorted(owned) == sorted(every)


def test_fields_of_texts_are_those_that_texts_read():
    read = {f"data.{field.name}" for field in dataclasses.fields(TextSettings)}
    unused = {name for name in unused_fields(Config()) if name.startswith("data.")}
    assert unused == read | {"data.shards_per_client", "data.directory"}
    assert not read & set(unused_fields(with_fields(Config(), {"data.name": "text"})))


def test_settings_of_the_method_are_told_where_the_user_chose_them():
    """A file makes them for all algorithms; what was set by name was meant."""
    values = {"algorithm": "fedavg", "p1": 0.5, "p2": 0.3, "bits": 2, "sampling": "fixed_count"}
    config = with_fields(Config(), values)
    assert ignored_settings(config) == []
    assert ignored_settings(config, ["p1", "bits", "sampling", "rounds"]) == [
        f"{setting} has no effect with algorithm = 'fedavg'"
        for setting in ("p1 = 0.5", "sampling = 'fixed_count'", "bits = 2")
    ]
    # A value that is the default says nothing of what was meant.
    assert ignored_settings(with_fields(Config(), {"algorithm": "fedq"}), ["p1", "p2"]) == []


@pytest.mark.parametrize(
    ("values", "why"),
    [
        ({"algorithm": "fedsn", "codebook": "uniform"}, "algorithm = 'fedsn'"),
        ({"algorithm": "fedlpp", "lora.rank": 2, "p2": 0.4}, "algorithm = 'fedlpp'"),
        ({"p1": 0.0, "p2": 0.0, "sampling": "fixed_count"}, "p1 = 0 and p2 = 0"),
        ({"upload.block_size": 8}, "upload.bits = 0"),
        ({"fedsp.prompts": 3}, "algorithm = 'fedqsn'"),
        (
            {"algorithm": "fedsp", "fedsp.auxiliary_share": 0.0, "fedsp.auxiliary_rate": 0.5},
            "fedsp.auxiliary_share = 0.0",
        ),
        (
            {"algorithm": "fedsp", "fedsp.distillation_steps": 0, "fedsp.temperature": 2.0},
            "fedsp.distillation_steps = 0",
        ),
        ({"algorithm": "fedsp", "sites": "residual"}, "algorithm = 'fedsp'"),
        ({"algorithm": "fedavg", "sites": "residual"}, "algorithm = 'fedavg'"),
        ({"algorithm": "fedlpp", "lora.rank": 2, "sites": "residual"}, "algorithm = 'fedlpp'"),
        ({"algorithm": "fedsn", "p1": 0.0, "p2": 0.0, "sites": "residual"}, "p1 = 0 and p2 = 0"),
        ({"lora.alpha": 4.0}, "lora.rank = 0"),
        ({"participation.straggler_share": 0.1}, "participation.stragglers = 0.0"),
        ({"client.optimizer": "adam", "client.momentum": 0.9}, "client.optimizer = 'adam'"),
        ({"pretraining.weight_decay": 0.1}, "pretraining.optimizer = 'sgd'"),
        ({"client.warmup": 0.5}, "client.schedule = 'constant'"),
        ({"server.optimizer": "yogi", "server.momentum": 0.9}, "server.optimizer = 'yogi'"),
    ],
)
def test_what_leaves_a_setting_without_effect_is_said(values, why):
    name, value = list(values.items())[-1]
    config = with_fields(Config(), values)
    assert ignored_settings(config, values) == [f"{name} = {value!r} has no effect with {why}"]


def test_settings_that_are_used_are_not_told():
    used = {
        "fedqsn": {"p1": 0.0, "p2": 0.5, "bits": 3, "sampling": "fixed_count"},
        "fedsn": {"sites": "residual", "p1": 0.1, "p2": 0.0, "sampling": "fixed_count"},
        "fedq": {
            "sites": "residual",
            "bits": 3,
            "block_size": 8,
            "codebook": "uniform",
            "blocks": "row",
        },
        "fedlpp": {"lora.rank": 4, "lora.alpha": 2.0, "bits": 3},
        "fedsp": {
            "fedsp.auxiliary_rate": 0.5,
            "fedsp.distillation_noise": 0.5,
            "fedsp.temperature": 2.0,
        },
        "fedavg": {
            "sites": "residual",
            "upload.bits": 4,
            "client.optimizer": "adamw",
            "client.weight_decay": 0.1,
            "client.schedule": "linear",
            "client.warmup": 0.5,
            "server.momentum": 0.9,
        },
    }
    for algorithm, values in used.items():
        config = with_fields(Config(), {"algorithm": algorithm, **values})
        assert ignored_settings(config, values) == []


def test_epochs_beside_steps():
    """A file's epochs give way to the steps that one chooses; nobody else has both on purpose."""
    config = with_fields(Config(), {"client.steps": 5, "client.epochs": 3})
    told = ["client.epochs = 3 has no effect with client.steps = 5"]
    for chosen in ((), ("client.epochs",), ("client.steps", "client.epochs")):
        assert ignored_settings(config, chosen) == told
    assert ignored_settings(config, ["client.steps"]) == []
    for values in ({"client.steps": 5}, {"client.epochs": 3}):
        assert ignored_settings(with_fields(Config(), values), values) == []


def test_every_file_runs_with_every_algorithm_without_such_a_warning():
    for file in sorted(Path("configs").glob("*.py")):
        for algorithm in ("fedqsn", "fedavg", "fedsn", "fedq"):
            assert ignored_settings(read_config(f"{file}:{algorithm}", [])) == []


@pytest.mark.parametrize(
    ("values", "line"),
    [
        (
            {"data.clients": 50, "data.partition": "natural"},
            "data.clients = 50 has no effect with data.partition = 'natural'",
        ),
        (
            {"data.name": "text", "data.task": "sst2", "data.separator": False},
            "data.separator = False has no effect with data.task = 'sst2'",
        ),
        (
            {
                "data.name": "text",
                "data.task": "own",
                "data.labels": ("a", "b"),
                "data.template": "{x}",
            },
            "data.template = '{x}' has no effect with data.labels = ('a', 'b')",
        ),
        (
            {"model.name": "cnn", "data.name": "mnist", "data.test_rows": 5},
            "data.test_rows = 5 has no effect with data.name = 'mnist'",
        ),
        (
            {"data.directory": "there"},
            "data.directory = 'there' has no effect with data.name = 'digits'",
        ),
        (
            {"pretraining.steps": 0, "pretraining.learning_rate": 0.5},
            "pretraining.learning_rate = 0.5 has no effect with pretraining.steps = 0",
        ),
        ({"generation.beams": 1}, "generation.beams = 1 has no effect with generation.prompts = 0"),
    ],
)
def test_more_settings_without_effect(values, line):
    assert ignored_settings(with_fields(Config(), values), values) == [line]


def test_tasks_without_a_prompt_are_those_that_classify():
    assert set(CLASSIFICATION) == {name for name, kind in FORMATS.items() if kind.labels}


@given(
    algorithm=st.sampled_from(ALGORITHMS),
    p1=st.sampled_from([0.0, 0.3]),
    p2=st.sampled_from([0.0, 0.3]),
)
def test_the_method_uses_what_its_fields_say(algorithm, p1, p2):
    """What stands beside the fields agrees with the algorithms themselves."""
    config = with_fields(Config(), {"algorithm": algorithm, "p1": p1, "p2": p2})
    made = algorithm_of(config)
    unused = without_effect(config)
    assert ("bits" in unused) == (made.quantizer is None)
    assert ("sampling" in unused) == (not made.p1 and not made.p2)
    assert ("fedsp.prompts" in unused) == (not made.prompts_only)
    used = as_used(config)
    assert (used.p1, used.p2) == (made.p1, made.p2)
    assert algorithm_of(used) == made
