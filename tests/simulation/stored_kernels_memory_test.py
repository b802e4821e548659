"""A language model's frozen tensors: stored narrow, sent as codes, and never whole in float32."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from fedqsn_jax.config.schema import Config, ConfigError, resolve, with_fields
from fedqsn_jax.core.trees import leaves_by_path, tree_bytes
from fedqsn_jax.data.population import FederatedData
from fedqsn_jax.generation.language_tasks import conditional_generation
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.llama import LlamaConfig
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.simulation.compose import make_simulation

FAST = {"xla_backend_optimization_level": 0}
CONFIG = LlamaConfig("llama", 64, 128, 3, 2, 2, 64, 512, positions=16)
TEXT = {
    "data": {"clients": 2, "name": "text", "task": "e2e", "train": "e2e:file"},
    "model": {"name": "language", "pretrained": "somewhere"},
}


def settings(**others):
    values = {
        "rounds_per_call": 1,
        "p1": 0.2,
        "p2": 0.3,
        "lora": {"rank": 2},
        "pretraining": {"steps": 0},
        "client": {"steps": 2, "batch_size": 2, "optimizer": "adamw", "learning_rate": 0.01},
        "cohort": {"size": 2, "parallelism": "scan"},
        "evaluation": {"attackers": (), "proxy_samples": 2},
    }
    return resolve({**values, **TEXT, **others})


@pytest.fixture(scope="module")
def simulation():
    model = make_language_model(CONFIG, Execution(remat=True), 0.0)
    tokens = jax.random.randint(jax.random.key(3), (4, 8), 0, CONFIG.vocab_size)
    rows = {"tokens": tokens, "mask": tokens >= 0, "loss_mask": tokens >= 0}
    data = FederatedData(rows, jnp.asarray([0, 2, 4], jnp.int32))
    params = jax.tree.map(lambda leaf: leaf.astype(jnp.bfloat16), model.init(jax.random.key(0)))
    made = make_simulation(
        settings(), model.apply_fn, conditional_generation(), params, data, model.trained_fn
    )
    return made, params, data


@pytest.fixture(scope="module")
def compiled(simulation):
    made, params, data = simulation
    state = jax.eval_shape(made.federation.init, jax.random.key(1), params)
    run = jax.jit(made.federation.round, donate_argnums=0)
    return run.lower(state, data).compile(compiler_options=FAST)


def test_a_round_leaves_what_is_frozen_as_it_is_and_narrow(simulation, compiled):
    made, params, data = simulation
    assert len(made.method.stored) == 7
    state = jax.jit(made.federation.init)(jax.random.key(1), params)
    start = {path: np.asarray(leaf) for path, leaf in leaves_by_path(state.params).items()}
    assert not state.attackers
    state, facts = compiled(state, data)
    assert np.isfinite(facts["train/loss"])
    for path, leaf in leaves_by_path(state.params).items():
        trained = "_lora_" in path
        assert leaf.dtype == (jnp.float32 if trained else jnp.bfloat16)
        assert (np.asarray(leaf).tobytes() != start[path].tobytes()) == trained


def test_no_float32_copy_of_what_is_frozen_is_made(simulation, compiled):
    """The program's own account, against the estimate and against such a copy."""
    made, params, _ = simulation
    needs = compiled.memory_analysis()
    kernels = sum(leaf.size for leaf in jax.tree.leaves(params["layers"]))
    assert needs.alias_size_in_bytes >= tree_bytes(params), "the state is donated"
    assert made.memory["codes of frozen kernels"] < 1.1 * kernels
    # Codes, one kernel's values and what finding them takes, but not 4 bytes a weight.
    assert needs.temp_size_in_bytes < 4 * kernels
    text = compiled.as_text()
    for shape in ("3,128,512", "3,512,128", "3,128,128"):
        assert f"u8[{shape}]" in text
        assert f"f32[{shape}]" not in text


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"pretraining": {"steps": 3}}, r"pretraining.steps = 3: all tensors are trained"),
        ({"lora": {"rank": 0}}, r"lora.rank = 0 and client.trained = \(\)"),
        ({"evaluation": {"fine_tuned_attackers": 9}}, "evaluation.fine_tuned_attackers = 9"),
    ],
)
def test_what_would_train_narrow_tensors_is_refused(changes, told):
    narrow = {"model": {**TEXT["model"], "dtype": "bfloat16"}}
    assert settings(**narrow).model.dtype == "bfloat16"
    with pytest.raises(ConfigError, match=f"^model.dtype = 'bfloat16' with {told}.*float32$"):
        settings(**narrow, **changes)


def test_a_model_that_does_not_fit_names_three_settings(monkeypatch):
    for module in ("problems.limits", "simulation.client_run", "simulation.round_memory"):
        monkeypatch.setattr(f"fedqsn_jax.{module}.device_bytes", lambda: 2**30)
    large = dataclasses.replace(CONFIG, width=1024, inner=4096, layers=12, head_size=512)
    model = make_language_model(large, Execution(), 0.0)
    rows = {"tokens": jnp.zeros((4, 8), jnp.int32), "loss_mask": jnp.ones((4, 8), bool)}
    data = FederatedData(rows, jnp.asarray([0, 2, 4], jnp.int32))
    config = with_fields(settings(), {"evaluation.attackers": (1,)})
    params = jax.eval_shape(model.init, jax.random.key(0))
    with pytest.raises(ConfigError, match="smaller, each with those before it: ") as refused:
        make_simulation(
            config, model.apply_fn, conditional_generation(), params, data, model.trained_fn
        )
    told = str(refused.value).partition("before it: ")[2].split(", ")
    sizes = [float(one.rpartition("(")[2].removesuffix(" GiB)")) for one in told]
    assert len(told) == 3
    assert told[0].startswith("model.dtype = 'bfloat16'")
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[-1] > 0
    assert Config().model.dtype == "float32"
