"""What a run will cost, before it runs: how tensors travel, bytes a client, memory."""

import jax

from fedqsn_jax.core.trees import leaves_by_path
from fedqsn_jax.core.types import Params
from fedqsn_jax.protocol.masks import hidden_count
from fedqsn_jax.protocol.sites import MaskSite
from fedqsn_jax.reporting.summary import Costs, TensorRow
from fedqsn_jax.simulation.compose import Simulation


def tensor_rows(simulation: Simulation, params: Params) -> list[TensorRow]:
    """Says of every tensor whether it is a mask site and how it travels.

    Args:
      simulation: The method.
      params: The plain model's parameters, or their shapes.
    """
    if simulation.lora is not None:
        params = jax.eval_shape(simulation.lora.add, jax.random.key(0), params)
    sites, roles = simulation.sites, simulation.roles
    quantizer = simulation.algorithm.quantizer
    rows = []
    for path, leaf in leaves_by_path(params).items():
        site = sites.of(path)
        travels = f"{leaf.dtype}, whole"
        hidden = None
        if site is not None:
            masked = site.mask_path in simulation.traffic.down.per_column
            hidden = hidden_share(simulation, site) if masked else None
            columns = "visible columns" if masked else "whole"
            travels = f"{leaf.dtype}, {columns}"
            if quantizer is not None and path == site.path and site.quantized:
                name = type(quantizer).__name__
                travels = (
                    f"{quantizer.code_bits}-bit {name}, block {quantizer.block_size}, {columns}"
                )
        if path in (roles.withheld or ()):
            travels = "never sent"
        elif roles.sent is not None and path not in roles.sent:
            travels = "public, not sent"
        elif roles.trained is not None and path not in roles.trained:
            travels += "; frozen"
        elif roles.returned is not None and path not in roles.returned:
            travels += "; not returned"
        kernel = sites.by_kernel.get(path)
        rows.append(
            TensorRow(
                path=path,
                shape=tuple(leaf.shape),
                dtype=str(leaf.dtype),
                travels=travels,
                columns=None if kernel is None else kernel.layers * kernel.columns,
                fan_in=None if kernel is None else kernel.fan_in,
                hidden=hidden,
            )
        )
    return rows


def hidden_share(simulation: Simulation, site: MaskSite) -> float:
    """Expected share of a site's columns that one client does not see in one round.

    With ``fixed_count`` it is the share of whole columns that are hidden, not the configured one.
    """
    algorithm = simulation.algorithm

    def visible(probability: float) -> float:
        if algorithm.sampling == "bernoulli":
            return 1 - probability
        return 1 - int(hidden_count(site, probability)) / site.columns

    return 1 - visible(algorithm.p1) * visible(algorithm.p2)


def payloads_per_client(simulation: Simulation) -> float:
    """Expected payloads that a client of a cohort is sent in a round, over a whole run.

    One, but for one-way rounds in which a client's payload stays the same: it is sent once to each
    client that ever takes part, and again to one that has lost it.
    """
    config, broadcast = simulation.config, simulation.method.broadcast
    if not broadcast.is_one_way or broadcast.renewed or not config.rounds:
        return 1.0
    drawn = config.cohort.size / simulation.population
    first = (1 - (1 - drawn) ** config.rounds) / (drawn * config.rounds)
    return first + (1 - first) * config.participation.lost_copies


def expected_costs(simulation: Simulation) -> Costs:
    """Expected bytes down and up a client a round, and an estimate of memory.

    Args:
      simulation: The method.
    """
    traffic = simulation.traffic
    visible = {
        site.path: (1 - hidden_share(simulation, site)) * site.layers * site.columns
        for site in simulation.sites
        if site.path in traffic.down.per_column
    }
    return Costs(
        down=payloads_per_client(simulation) * traffic.down.of(visible),
        up=(1 - simulation.config.participation.dropout) * traffic.up.of(visible),
        fedavg_down=traffic.fedavg_down,
        fedavg_up=traffic.fedavg_up,
        memory=(*simulation.memory.items(), ("in all", sum(simulation.memory.values()))),
        hides=bool(visible or simulation.roles.withheld),
    )
