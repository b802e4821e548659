"""What each of the four views writes: the texts and scores that belong to `views.evaluate_views`.

Generation costs far more than a forward pass, so views are made and evaluated one after the other,
when it is asked for, and no two of them are held at once.
"""

from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax
import numpy as np

from fedqsn_jax.core.types import Key, Params
from fedqsn_jax.generation.text_evaluation import TextEvaluator
from fedqsn_jax.protocol.proxy import Proxy, effective_params
from fedqsn_jax.rounds.views import Attacker, attacker_params, server_params


class TextViews(NamedTuple):
    """What all views wrote.

    Attributes:
      metrics: Named ``view/metric``; of the proxy view the mean over client masks, and
        ``proxy/METRIC_std``, the population standard deviation.
      texts: By view, one text a prompt; of the proxy view those of the first client mask.
    """

    metrics: dict[str, float]
    texts: dict[str, list[str]]


def view_params(
    params: Params,
    prepared: Proxy,
    apply: Callable[[Key, Proxy], Proxy],
    proxy_keys: Key,
    attackers: dict[str, Attacker],
) -> Iterator[tuple[str, Params]]:
    """Yields the parameters of all views by name, each when it is asked for.

    Args:
      params: The hidden model.
      prepared: The round's proxy before client masks, dequantized.
      apply: Makes a client's proxy from it.
      proxy_keys: Keys ``[samples]``: client masks; the name ``proxy`` comes once for each.
      attackers: The attackers by name.
    """
    yield "global", params
    yield "server", jax.jit(server_params)(params, prepared)
    one_proxy = jax.jit(lambda key, prepared: effective_params(apply(key, prepared)))
    for key in proxy_keys:
        yield "proxy", one_proxy(key, prepared)
    as_model = jax.jit(
        lambda attacker, prepared: attacker_params(attacker, prepared.sites, prepared.params)
    )
    for name, attacker in attackers.items():
        yield name, as_model(attacker, prepared)


def evaluate_text_views(evaluate: TextEvaluator, views: Iterator[tuple[str, Params]]) -> TextViews:
    """Generates and scores the texts of all views.

    Args:
      evaluate: Evaluates one set of parameters.
      views: From `view_params`.
    """
    found: dict[str, list[dict[str, float]]] = {}
    texts: dict[str, list[str]] = {}
    for view, params in views:
        written = evaluate(params)
        found.setdefault(view, []).append(written.metrics)
        texts.setdefault(view, written.texts)
    metrics = {}
    for view, samples in found.items():
        for name in samples[0]:
            values = [sample[name] for sample in samples]
            metrics[f"{view}/{name}"] = float(np.mean(values))
            if view == "proxy":
                metrics[f"{view}/{name}_std"] = float(np.std(values))
    return TextViews(metrics, texts)
