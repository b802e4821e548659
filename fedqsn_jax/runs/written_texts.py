"""The texts that every view of a trained model writes: made once, kept beside the run."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax

from fedqsn_jax.core.trees import combine, exclude
from fedqsn_jax.generation.text_views import evaluate_text_views, view_params
from fedqsn_jax.host.devices import own_copy
from fedqsn_jax.problems.problem import Texts
from fedqsn_jax.reporting.writers import write_json
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.simulation.compose import Simulation


def write_texts(
    simulation: Simulation,
    state: ServerState,
    texts: Texts,
    file: Path,
    on_prompts: Callable[[int], None],
) -> dict[str, float]:
    """Lets all views answer the prompts and keeps what they wrote.

    Args:
      simulation: The method.
      state: Its state after the last round.
      texts: What is to be written.
      file: Where the texts are kept: JSON with ``round``, ``metrics`` (named ``view/metric``) and
        ``texts``, for each prompt ``prompt``, ``references`` and what each view wrote. If it has
        those of this round, they are not made again.
      on_prompts: Told how many more prompts are done; each view answers all of them, the proxy view
        once for each client mask.

    Returns:
      The metrics.
    """
    finished = int(state.round)
    stored = _read(file, finished)
    if stored is not None:
        return stored
    state = own_copy(state)
    federation, transform = simulation.federation, simulation.algorithm.transform
    views = view_params(
        state.params,
        jax.jit(federation.prepare)(state),
        lambda key, prepared: transform.apply(key, state.transform_state, prepared),
        federation.proxy_keys(state)[: simulation.config.generation.proxy_samples],
        state.attackers,
    )
    evaluate = texts.make_evaluator(on_prompts)
    # What clients do not receive is public, and so in every view.
    public = exclude(state.params, simulation.roles.sent)
    as_model = jax.jit(lambda view: simulation.merged(combine(view, public)))
    found = evaluate_text_views(lambda view: evaluate(as_model(view)), views)
    answers: list[dict[str, Any]] = [
        {
            "prompt": prompt,
            "references": references,
            **{view: written[index] for view, written in found.texts.items()},
        }
        for index, (prompt, references) in enumerate(
            zip(texts.prompts.texts, texts.prompts.references, strict=True)
        )
    ]
    write_json(file, {"round": finished, "metrics": found.metrics, "texts": answers})
    return found.metrics


def passes(simulation: Simulation, state: ServerState) -> int:
    """Returns how many times the prompts are answered."""
    samples = simulation.federation.proxy_keys(state).shape[0]
    return 2 + min(samples, simulation.config.generation.proxy_samples) + len(state.attackers)


def _read(file: Path, finished: int) -> dict[str, float] | None:
    """The metrics of texts that were written after this round before."""
    try:
        stored = json.loads(file.read_text())
    except (OSError, ValueError):
        return None
    return stored["metrics"] if stored.get("round") == finished else None
