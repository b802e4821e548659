"""A federation of the tests' small model, and what its clients get, for tests of whole rounds."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax

from fedqsn_jax.core.keys import client_round_key, fold_in_name
from fedqsn_jax.core.tasks import classification
from fedqsn_jax.core.trees import TensorRoles
from fedqsn_jax.protocol.algorithms import fedqsn
from fedqsn_jax.protocol.broadcast import EVERY_ROUND
from fedqsn_jax.protocol.proxy import dequantize_proxy, whole_proxy
from fedqsn_jax.protocol.quantization import NormalFloat
from fedqsn_jax.protocol.upload import whole_upload
from fedqsn_jax.rounds.aggregation import make_aggregator, make_running_mean
from fedqsn_jax.rounds.client import make_client_update
from fedqsn_jax.rounds.client_axis import ClientAxis, sample_cohort
from fedqsn_jax.rounds.client_optimizer import unscheduled
from fedqsn_jax.rounds.evaluation import make_evaluator
from fedqsn_jax.rounds.federation import Evaluation, make_federation
from fedqsn_jax.rounds.method import Method
from fedqsn_jax.rounds.participation import EVERYONE

FAST = {"xla_backend_optimization_level": 0}
"""Most of these tests' time is compilation."""
KEY = jax.random.key(4)
POPULATION = 8
FEDQSN = fedqsn(NormalFloat(2, 4), 0.3, 0.4)
TRANSFORM = FEDQSN.transform


def federate(
    model,
    algorithm,
    *,
    cohort=4,
    chunk=1,
    server=None,
    client=None,
    attackers=(1, 4),
    batch_size=4,
    epochs=2,
    trained=None,
    sent=None,
    proximal=0.0,
    participation=EVERYONE,
    upload=None,
    broadcast=EVERY_ROUND,
    mask_per="round",
    privacy=None,
    sampling="without_replacement",
    **aggregation,
):
    task = classification()
    update = make_client_update(
        model.apply_fn,
        task,
        unscheduled(client or optax.sgd(0.2)),
        batch_size,
        epochs=epochs,
        trained=trained,
        proximal=proximal,
    )
    method = Method(
        transform=algorithm.transform,
        update=update,
        aggregator=make_running_mean(model.sites, trained=trained, **aggregation)
        if broadcast.is_one_way
        else make_aggregator(model.sites, server or optax.sgd(1.0), trained=trained, **aggregation),
        sites=model.sites,
        roles=TensorRoles(sent=sent, trained=trained, returned=trained),
        upload=upload or whole_upload(),
        participation=participation,
        broadcast=broadcast,
        mask_per=mask_per,
        privacy=privacy,
    )
    evaluation = Evaluation(
        evaluator=make_evaluator(model.apply_fn, task, 16),
        score=task.score,
        proxy_samples=3,
        attackers=attackers,
    )
    federation = make_federation(
        method, evaluation, population=POPULATION, cohort=cohort, sampling=sampling
    )
    return federation.with_client_axis(ClientAxis(chunk))


def shared_federation(model, participation=EVERYONE):
    """That of the fixture ``shared``: Adam on both sides."""
    server = optax.chain(optax.clip_by_global_norm(0.5), optax.adam(0.05))
    client = optax.adamw(0.01, weight_decay=0.1)
    return federate(model, FEDQSN, server=server, client=client, participation=participation)


def octets(tree):
    return [
        np.asarray(
            jax.random.key_data(leaf) if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key) else leaf
        ).tobytes()
        for leaf in jax.tree.leaves(tree)
    ]


def fast(function):
    return jax.jit(function, compiler_options=FAST)


def cohort_of(state, cohort=4):
    key = fold_in_name(jax.random.fold_in(state.public_key, state.round), "cohort")
    return np.asarray(sample_cohort(key, POPULATION, cohort))


def double(tree):
    return jax.tree.map(lambda leaf: np.asarray(leaf, np.float64), tree)


@functools.cache
def simulator(transform, sites):
    def simulate(params, transform_state, secret_key, round_index, ids):
        prepared = dequantize_proxy(transform.prepare(transform_state, whole_proxy(params, sites)))

        def one(client_id):
            key = client_round_key(secret_key, round_index, client_id)
            return transform.apply(key, transform_state, prepared)

        return jax.vmap(one)(ids), prepared.visible

    return fast(simulate)


def simulated_proxies(transform, model, state):
    """What each client of the population gets in the state's round, and the server's mask."""
    stacked, visible = jax.device_get(
        simulator(transform, model.sites)(
            state.params,
            state.transform_state,
            state.secret_key,
            state.round,
            np.arange(POPULATION, dtype=np.int32),
        )
    )
    each = [jax.tree.map(lambda leaf, i=i: leaf[i], stacked) for i in range(POPULATION)]
    return each, visible
