"""From a configuration to a language model: every setting arrives where it belongs.

What is built is compared as a program: traced, not compiled, with what the setting asks for. So
each comparison also fails if another setting than the one at issue is lost or confused.
"""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from language_run_cases import BERT, GPT2, VOCABULARY, classify, write, write_model
from text_cases import MARKS

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.generation.beam_search import GenerationSettings, make_generator
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.t5_config import T5Config
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems import language
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.problems.training import pretrain
from fedqsn_jax.prompting.prompted_model import (
    Distillation,
    auxiliary_encoder,
    distil,
    prompted_apply,
    prompted_encoder,
    take_auxiliary,
)
from fedqsn_jax.rounds.client_optimizer import scheduled
from fedqsn_jax.runs.experiment import load_problem

KEY = jax.random.key(3)
T5 = T5Config("t5", VOCABULARY, 16, 1, 1, 2, 8, 16, eos_token_ids=(2,))


@pytest.fixture(scope="module")
def places(tmp_path_factory):
    """The directory of each family's model."""
    configs = {"bert": BERT, "gpt2": GPT2, "t5": T5}
    return {
        name: write_model(tmp_path_factory.mktemp(name), config) for name, config in configs.items()
    }


def configured(flags, **fields):
    """The configuration of a run's flags, with other values of some fields."""
    first, *rest = flags
    name = first.removeprefix("--config=") + (":fedsp" if "fedsp__layers" in fields else "")
    changes = [f"--config.{key.replace('__', '.')}={value}" for key, value in fields.items()]
    return read_config(name, [*rest, *changes])


def program(function, *arguments):
    """What is computed, as text; or why it is refused here."""
    try:
        text = str(jax.make_jaxpr(function)(*arguments))
    except ValueError as error:
        return str(error)
    return re.sub(r"0x[0-9a-f]+", "", text)


def batch_of(problem):
    return {name: jnp.asarray(rows[:2]) for name, rows in problem.splits.test.items()}


EXECUTIONS = {
    "default": ({}, Execution()),
    "compute_dtype": ({"client__compute_dtype": "bfloat16"}, Execution("bfloat16")),
    # Elsewhere than on a GPU it is refused where nothing is dropped; so is what is expected.
    "attention": (
        {"client__compute_dtype": "bfloat16", "model__attention": "cudnn"},
        Execution("bfloat16", "cudnn"),
    ),
    "unroll": ({"model__unroll": 2}, Execution(unroll=2)),
    "remat": ({"model__remat": True}, Execution(remat=True)),
}
RATES = {"client__dropout": 0.25, "pretraining__dropout": 0.5}


@pytest.mark.parametrize(
    ("family", "setting"), [("gpt2", "default"), *(("bert", setting) for setting in EXECUTIONS)]
)
def test_clients_server_and_evaluation_compute_as_configured(family, setting, places):
    """Each with its own dropout, and dropout only in training."""
    flags = (classify if family == "bert" else write)(places[family])
    fields, execution = EXECUTIONS[setting]
    problem = load_problem(problem_settings(configured(flags, **fields, **RATES)))
    arguments = problem.params, batch_of(problem), KEY
    architecture = (
        GPT2 if family == "gpt2" else dataclasses.replace(BERT, classes=2, pooling="mean")
    )

    def expected(rate, key=KEY):
        model = make_language_model(architecture, execution, rate)
        return program(model.apply_fn, *arguments[:2], key)

    clients, server = expected(0.25), expected(0.5)
    assert program(problem.client_apply, *arguments) == clients
    assert program(problem.pretraining_apply, *arguments) == server
    without = program(problem.apply_fn, *arguments[:2], None)
    assert without == expected(0.0, None)
    assert len({clients, server, without}) == 3
    refused = setting == "attention" and jax.default_backend() != "gpu"
    assert ("needs a GPU" in without) == refused
    if setting != "default":
        default = make_language_model(architecture, dropout=0.25).apply_fn
        assert program(default, *arguments) != clients


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_the_loss_of_completions_is_smoothed_as_configured(family, places):
    """By hand: the target has 1 - s, and s is spread evenly over the vocabulary."""
    problem = load_problem(
        problem_settings(configured(write(places[family]), client__label_smoothing=0.3))
    )
    batch = jax.tree.map(np.asarray, batch_of(problem))
    of_t5 = family == "t5"
    names = ("target_tokens", "target_mask") if of_t5 else ("tokens", "loss_mask")
    tokens, mask = (batch[name] for name in names)
    rng = np.random.default_rng(0)
    logits = rng.normal(size=(*tokens.shape, VOCABULARY)).astype(np.float32)
    odds = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    losses = []
    for row, at in np.argwhere(mask):
        own = odds[row, at if of_t5 else at - 1]
        target = np.full(VOCABULARY, 0.3 / VOCABULARY)
        target[tokens[row, at]] += 0.7
        losses.append(-(target * np.log(own)).sum())
    loss = problem.task.loss(logits, batch, jnp.ones(len(tokens), bool))
    np.testing.assert_allclose(loss, np.mean(losses), rtol=1e-5)


@pytest.mark.parametrize("family", ["gpt2", "t5"])
def test_texts_are_searched_for_as_configured(family, places, monkeypatch):
    """Only a decoder's prompt is a part of its text, whose n-grams must not come again."""
    made = []

    def remember(*arguments, **options):
        made.append((arguments, options))
        return make_generator(*arguments, **options)

    monkeypatch.setattr(language, "make_generator", remember)
    fields = {
        "generation__prompts": 2,
        "generation__new_tokens": 5,
        "generation__beams": 3,
        "generation__no_repeat_ngram": 2,
        "generation__length_penalty": 0.4,
        "client__compute_dtype": "bfloat16",
    }
    problem = load_problem(problem_settings(configured(write(places[family]), **fields)))
    (((decoder, settings, ends, pad), options),) = made
    assert settings == GenerationSettings(5, 3, no_repeat_ngram=2, length_penalty=0.4)
    assert options == {"prompt_ngrams": family != "t5"}
    assert (ends, pad) == ((2,), MARKS.index("<pad>"))
    model = make_language_model(GPT2 if family == "gpt2" else T5, Execution("bfloat16"))
    prompts = problem.texts.prompts
    batch = {"tokens": jnp.asarray(prompts.tokens), "mask": jnp.asarray(prompts.mask)}

    def prefill(decoder):
        return program(
            lambda params, batch: decoder.prefill(params, batch, 5), problem.params, batch
        )

    assert prefill(decoder) == prefill(model.decoder)
    assert len(prompts.texts) == 2


def test_labels_that_a_heads_names_contradict_are_told(tmp_path):
    """The head of a fine-tuned model is taken in order: 0 is what it calls good, not bad."""
    for labels, told in ((("positive", "negative"), True), (("negative", "positive"), False)):
        place = tmp_path / labels[0]
        write_model(place, dataclasses.replace(BERT, classes=2, labels=labels))
        problem = load_problem(problem_settings(configured(classify(place), model__pooling="cls")))
        line = "the model's head is of positive, negative, and the task's labels are negative, "
        assert any(note.startswith(line) for note in problem.notes) == told


FEDSP = {
    "fedsp__layers": (-1,),
    "fedsp__passes": 1,
    "fedsp__distillation_steps": 2,
    "fedsp__distillation_rate": 0.003,
    "fedsp__distillation_noise": 0.25,
    "fedsp__temperature": 2.5,
    "pretraining__batch_size": 4,
    "pretraining__steps": 2,
}
"""No value is its default."""


def encoders(architecture, rate, execution=None):
    dropping = architecture.with_dropout(rate)
    return prompted_encoder(dropping, execution), auxiliary_encoder(dropping, 1, 1, execution)


def test_prompts_are_tuned_as_configured(places):
    """Clients and server have their own dropout; distillation has none, and its own settings."""
    fields = {**FEDSP, **RATES, "client__compute_dtype": "bfloat16"}
    config = configured(classify(places["bert"]), **fields)
    problem = load_problem(problem_settings(config))
    architecture = dataclasses.replace(BERT, classes=2, pooling="mean")
    execution, batch = Execution("bfloat16"), batch_of(problem)

    def expected(rate, key=KEY):
        apply = prompted_apply(*encoders(architecture, rate, execution))
        return program(apply, problem.params, batch, key)

    clients, server, without = expected(0.25), expected(0.5), expected(0.0, None)
    assert len({clients, server, without}) == 3
    assert program(problem.client_apply, problem.params, batch, KEY) == clients
    assert program(problem.pretraining_apply, problem.params, batch, KEY) == server
    assert program(problem.apply_fn, problem.params, batch, None) == without

    def distillation(key, params, private):
        return distil(
            key,
            *encoders(architecture, 0.0, execution),
            params=take_auxiliary(params, (-1,)),
            rows=private,
            settings=Distillation(
                scheduled(optax.adam, 0.003), steps=2, batch_size=4, temperature=2.5, noise=0.25
            ),
        )[0]

    arguments = KEY, problem.params, jax.tree.map(jnp.asarray, problem.splits.private)
    finish = functools.partial(problem.preparation.finish, config.pretraining)
    assert program(finish, *arguments) == program(distillation, *arguments)


def test_the_small_model_is_taken_from_what_the_server_has_trained(places):
    """Of its layers the last, after its own training on its rows; without distillation as it is."""
    fields = {**FEDSP, "fedsp__distillation_steps": 0}
    config = configured(classify(places["bert"]), **fields)
    problem = load_problem(problem_settings(config))
    trained = pretrain(
        config,
        problem.pretraining_apply,
        problem.task,
        problem.params,
        problem.splits.private,
        problem.preparation,
    )
    for name, each in trained["model"].items():
        own = jax.tree.map(lambda leaf: leaf[1:], each) if name == "layers" else each
        jax.tree.map(np.testing.assert_array_equal, trained["auxiliary"][name], own)
    for before, after in zip(
        *map(jax.tree.leaves, (problem.params["auxiliary"], trained["auxiliary"])), strict=True
    ):
        assert (before != after).any()
    np.testing.assert_array_equal(trained["prompts"], problem.params["prompts"])
