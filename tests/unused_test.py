"""Settings without effect are known, and said."""

import dataclasses

from fedqsn_jax.config import MODELS, Config, ModelConfig, with_fields
from fedqsn_jax.data.text import TextSettings
from fedqsn_jax.unused import ignored_settings, unused_fields


def test_settings_that_are_ignored_are_told():
    values = {"model.name": "cnn", "model.hidden": (8,), "model.dense": 7, "data.task": "sst2"}
    assert ignored_settings(with_fields(Config(), values)) == [
        "model.hidden = (8,) has no effect with model.name = 'cnn'",
        "data.task = 'sst2' has no effect with data.name = 'digits'",
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
    assert unused == read | {"data.shards_per_client"}
    assert not read & set(unused_fields(with_fields(Config(), {"data.name": "text"})))
