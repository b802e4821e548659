"""Audits of a sweep's points: many small runs, whose programs are compiled once."""

import dataclasses
import json
import shutil
from pathlib import Path
from typing import Any

from fedqsn_jax.audit.adversaries import check_colluders
from fedqsn_jax.audit.case import Case, case_of_experiment, require_auditable
from fedqsn_jax.audit.playing import RECEIVED, RESULTS, play
from fedqsn_jax.audit.report import Report, make_report, write
from fedqsn_jax.audit.scene import AuditSettings, Tools, make_tools
from fedqsn_jax.core.types import Params
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.reporting.display import silent_display
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.preparation import Experiment


class PointAuditor:
    """What a sweep asks of an audit: it is given this object and knows nothing else of audits.

    Attributes:
      described: The settings, as JSON has them.
    """

    def __init__(self, settings: AuditSettings) -> None:
        """Starts without any program.

        Args:
          settings: How thorough the audits are.
        """
        self._settings = settings
        self._tools: tuple[Any, Tools] | None = None
        self.described: dict[str, Any] = json.loads(json.dumps(dataclasses.asdict(settings)))

    def check(self, experiment: Experiment) -> None:
        """Makes sure that a point can be audited.

        Raises:
          ConfigError: It is FedSP's, or there are fewer clients than colluders.
        """
        require_auditable(experiment.config)
        check_colluders(self._settings.colluders, experiment.problem.splits.clients.clients)

    def __call__(
        self, experiment: Experiment, params: Params, final: ServerState, directory: Path
    ) -> dict[str, float | None]:
        """Audits a finished point, and leaves audit.json, audit.png and audit.html.

        Args:
          experiment: The point.
          params: The parameters before the first round, after the server's own training.
          final: The state after the last round.
          directory: Where the audit writes; what is there is removed.

        Returns:
          ``attack/WHO``, ``alone/WHO`` and ``strongest/WHO``, the scores of each coalition's best
          attack without queries, of its rows alone, and of the attack that is best on the test
          rows; and ``replay_difference``. None where there was no attack.
        """
        shutil.rmtree(directory, ignore_errors=True)
        directory.mkdir(mode=0o700, parents=True)
        case = case_of_experiment(experiment, params, final)
        results = play(
            case, self._settings, directory, silent_display(), tools=self._shared_tools(case)
        )
        report = make_report(case, self._settings, results)
        write(report, directory)
        for name in (RECEIVED, RESULTS):
            shutil.rmtree(directory / name)
        return _figures(report)

    def _shared_tools(self, case: Case) -> Tools:
        """The programs of the latest point, if this one's are the same whatever the seed."""
        config = case.config
        kind = (
            dataclasses.replace(problem_settings(config), seed=0),
            config.client.batch_size,
            config.client.compute_dtype,
            config.evaluation.batch_size,
        )
        if self._tools is None or self._tools[0] != kind:
            self._tools = kind, make_tools(case, self._settings)
        return self._tools[1]


def _figures(report: Report) -> dict[str, float | None]:
    figures: dict[str, float | None] = {"replay_difference": report["replay_difference"]}
    for name, each in report["adversaries"].items():
        for what, key in (("attack", "best"), ("alone", "alone")):
            figures[f"{what}/{name}"] = each[key] and each[key]["score"]["value"]
        scores = [
            one["score"]
            for one in each["attacks"]
            if "score" in one and not one["name"].startswith(("alone", "distilled_"))
        ]
        figures[f"strongest/{name}"] = max(scores, default=None)
    return figures
