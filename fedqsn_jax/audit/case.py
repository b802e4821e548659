"""What is audited: a finished run with its model, its rows and its states."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from fedqsn_jax.config.schema import FEDSP, LANGUAGE, Config, ConfigError, with_fields
from fedqsn_jax.core.keys import root_key
from fedqsn_jax.core.tasks import Task
from fedqsn_jax.core.trees import combine, exclude, leaves_by_path, path_of, select
from fedqsn_jax.core.types import ApplyFn, Array, Batch, Key, Params
from fedqsn_jax.data.population import ClientData, HeldOut, join_clients
from fedqsn_jax.data.splits import fingerprint
from fedqsn_jax.data.streamed import HostData
from fedqsn_jax.data.streamed import place as on_device
from fedqsn_jax.host.checkpoints import Checkpoints
from fedqsn_jax.models.functional import in_compute_dtype
from fedqsn_jax.models.parameter_files import DESCRIPTION, load_params
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.problems.training import hold_back, pretrain
from fedqsn_jax.protocol.proxy import scale_sites
from fedqsn_jax.protocol.sites import Sites
from fedqsn_jax.rounds.federation import ServerState
from fedqsn_jax.runs.preparation import Experiment, load_problem, prepare
from fedqsn_jax.runs.trained import load
from fedqsn_jax.runs.working_directory import WorkDirectory
from fedqsn_jax.simulation.compose import Simulation
from fedqsn_jax.simulation.running import initial_state, place


class Case(NamedTuple):
    """A finished run, as its auditor has it: everything, the secrets included.

    Attributes:
      config: The run's settings.
      simulation: The run's method.
      apply_fn: The plain model, as it is evaluated.
      train_apply: The same, as a thief trains it.
      task: What it is for.
      data: The clients' rows.
      held_out: The test rows, and the server's own on which settings are chosen during the run.
      start: The state before the first round.
      final: The state after the last.
    """

    config: Config
    simulation: Simulation
    apply_fn: ApplyFn
    train_apply: ApplyFn
    task: Task
    data: ClientData
    held_out: HeldOut
    start: ServerState
    final: ServerState

    @property
    def test(self) -> Batch:
        """The test rows."""
        return self.held_out.test

    @property
    def sites(self) -> Sites:
        """The mask sites."""
        return self.simulation.sites

    def sent(self, params: Params) -> Params:
        """Of a state's parameters the tensors that travel to clients, the others gaps."""
        return select(params, self.simulation.roles.sent)

    def owner(self, state: ServerState) -> Params:
        """The plain parameters of the owner's model in a state."""
        return self.simulation.merged(state.params)

    def model(self, values: Params, scale: dict[str, Array] | None = None) -> Params:
        """The plain parameters of a model that is made of what was received.

        Args:
          values: Values of the tensors that travel, not scaled.
          scale: A factor for each site, scalar or by column; absent: 1.
        """
        public = exclude(
            exclude(self.final.params, self.simulation.roles.sent), self.simulation.roles.withheld
        )
        scaled = scale_sites(values, self.sites, scale or {})
        return self.simulation.merged(combine(scaled, public))


def case_of_run(workdir: Path) -> Case:
    """Reads a finished run, and makes its start again.

    Raises:
      ConfigError: There is no finished run, its data are gone or others, or it is of a kind that
        is not audited.
      CheckpointError: Its last checkpoint cannot be read, or is of another version.
    """
    work = WorkDirectory(workdir)
    config = work.config()
    work.check(config)
    require_auditable(config)
    with Checkpoints(work.checkpoints, keep_latest=1, keep_best=0) as checkpoints:
        last = checkpoints.latest_round()
        if last is None or last < config.rounds:
            done = "no round was saved" if last is None else f"round {last} is the last saved"
            raise ConfigError(
                f"--workdir={workdir}: the run is not finished, {done} of {config.rounds}; the "
                f"command that began it resumes it"
            )
        experiment = prepare(_stepwise(config), noise=work.noise())
        problem = experiment.problem
        work.check_rows(fingerprint(problem.splits))
        shapes = jax.eval_shape(
            experiment.simulation.federation.init, root_key(config.seed), problem.params
        )
        final, _ = checkpoints.restore(shapes, config.rounds)
    params = pretrain(
        config,
        problem.pretraining_apply,
        problem.task,
        problem.params,
        experiment.private,
        problem.preparation,
    )
    return case_of_experiment(experiment, params, final)


def case_of_experiment(experiment: Experiment, params: Params, final: ServerState) -> Case:
    """Makes a case of a run in memory.

    Args:
      experiment: What was run.
      params: The parameters before the first round, after the server's own training.
      final: The state after the last round.

    Raises:
      ConfigError: The run is of a kind that is not audited.
    """
    config, problem = experiment.config, experiment.problem
    require_auditable(config)
    simulation = experiment.simulation.recompose(_stepwise(config))
    train_apply = problem.client_apply or in_compute_dtype(
        problem.apply_fn, config.client.compute_dtype
    )
    return Case(
        config,
        simulation,
        problem.apply_fn,
        train_apply,
        problem.task,
        problem.splits.clients,
        experiment.held_out,
        initial_state(simulation, params),
        place(simulation, final),
    )


class OwnModel(NamedTuple):
    """What an audit needs of a user's own model beside the result of `api.own_model.federate`.

    Attributes:
      apply_fn: ``(params, batch, key) -> outputs``, as `federate` had it (`linen_apply` and
        `nnx_split` make one of a module).
      params: The parameters that it started from, before the server's own training.
      clients: Each client's dictionary of arrays, or all of them joined, as `federate` had them.
      test: The test rows.
      private: The server's rows, if it had any.
    """

    apply_fn: ApplyFn
    params: Params
    clients: Sequence[Mapping[str, Any]] | HostData
    test: Mapping[str, Any]
    private: Mapping[str, Any] | None = None


def case_of_model(simulation: Simulation, final: ServerState, own: OwnModel) -> Case:
    """Makes a case of what `federate` gave.

    Args:
      simulation: What was run.
      final: The state after the last round.
      own: The model and the rows.

    Raises:
      ConfigError: Rows were held out, so that the clients that trained are not known; or the
        rounds are not finished.
      ValueError: The arrays of clients do not agree.
    """
    config = simulation.config
    require_auditable(config)
    if config.data.held_out_share or config.data.held_out_clients:
        raise ConfigError(
            "data.held_out_share, data.held_out_clients: the clients that trained are not those "
            "that are given; allowed is 0 for an audit"
        )
    if int(final.round) < config.rounds:
        raise ConfigError(f"the state is of round {int(final.round)} of {config.rounds}")
    stepwise = simulation.recompose(_stepwise(config))
    clients = own.clients
    if not isinstance(clients, HostData):
        rows = [{name: np.asarray(a) for name, a in each.items()} for each in clients]
        clients = HostData(*join_clients(rows))
    data = on_device(clients, config.data.resident)
    params = jax.tree.map(jnp.asarray, own.params)
    validation = None
    if own.private is not None:
        rows_of_server = {name: jnp.asarray(array) for name, array in own.private.items()}
        private, validation = hold_back(config, rows_of_server)
        params = pretrain(config, own.apply_fn, stepwise.task, params, private)
    return Case(
        config,
        stepwise,
        own.apply_fn,
        in_compute_dtype(own.apply_fn, config.client.compute_dtype),
        stepwise.task,
        data,
        HeldOut({name: jnp.asarray(a) for name, a in own.test.items()}, {}, validation),
        initial_state(stepwise, params),
        final,
    )


def _stepwise(config: Config) -> Config:
    """One round a call, so that the state before each is seen; evaluated at the end only."""
    return with_fields(config, {"rounds_per_call": 1, "evaluation.every": max(config.rounds, 1)})


def require_auditable(config: Config) -> None:
    """Refuses what the attacks do not know.

    Raises:
      ConfigError: The run is FedSP's, whose clients train prompts and not the model.
    """
    if config.algorithm == FEDSP:
        raise ConfigError(
            "algorithm = 'fedsp': clients get prompts and another model; allowed are runs of the "
            "other algorithms"
        )


def read_model(directory: Path, case: Case, option: str) -> Params:
    """Reads a model of the audited architecture.

    Args:
      directory: A run's, an exported model's, or a pre-trained language model's.
      case: The audited run.
      option: After which the user named the directory.

    Raises:
      ConfigError: There is none, or it has another architecture.
      UserError: A file of it is damaged.
    """
    if (directory / "checkpoints").is_dir():
        params = load(directory).params
    elif (directory / DESCRIPTION).is_file():
        params = load_params(directory).params
    elif case.config.model.name == LANGUAGE and directory.is_dir():
        settings = with_fields(case.config, {"model.pretrained": str(directory)})
        params = load_problem(problem_settings(settings)).params
    else:
        raise ConfigError(
            f"{option}={directory}: there is no run, no exported model and no pre-trained language "
            f"model in it"
        )
    require_same_architecture(params, case, f"{option}={directory}")
    return params


def read_reference(directory: Path, case: Case) -> Params:
    """Reads the model of a FedAvg run on the same rows, against which the benefit is measured.

    Raises:
      ConfigError: It is no run of FedAvg, or of other data or another architecture.
    """
    trained = load(directory)
    where = f"--reference={directory}"
    if trained.config.algorithm != "fedavg":
        raise ConfigError(f"{where}: algorithm = {trained.config.algorithm!r}; allowed is fedavg")
    for name in ("data", "seed"):
        ours, theirs = getattr(case.config, name), getattr(trained.config, name)
        if ours != theirs:
            raise ConfigError(f"{where}: its {name} differs from the run's; allowed is the same")
    require_same_architecture(trained.params, case, where)
    return trained.params


def require_same_architecture(params: Params, case: Case, where: str) -> None:
    """Makes sure that parameters have the names and shapes of the audited model's.

    Raises:
      ConfigError: They have not.
    """
    shapes = jax.eval_shape(case.owner, case.final)
    ours, theirs = (
        {path: tuple(leaf.shape) for path, leaf in leaves_by_path(tree).items()}
        for tree in (shapes, params)
    )
    for path in sorted(ours.keys() | theirs.keys()):
        if ours.get(path) != theirs.get(path):
            raise ConfigError(
                f"{where}: another architecture: {path} is {_shape(theirs.get(path))}, in the run "
                f"{_shape(ours.get(path))}"
            )


def _shape(shape: tuple[int, ...] | None) -> str:
    return "absent" if shape is None else "x".join(map(str, shape)) or "scalar"


def random_weights(key: Key, params: Params, sites: Sites) -> Params:
    """Weights as at initialization, in the shapes of a model's; nothing of its values is used.

    Kernels are normal with variance 1 / fan-in (LeCun et al., Efficient BackProp, 1998),
    embeddings normal with standard deviation .02, biases zero, the scales of norms one.

    Args:
      key: Draws them.
      params: The parameters, or their shapes.
      sites: The mask sites, which know the fan-in of their kernels.
    """
    fan_in = {site.path: site.fan_in for site in sites}
    tree = jax.tree_util.tree_flatten_with_path(params)[0]
    keys = jax.random.split(key, len(tree))
    order = {path_of(path): index for index, (path, _) in enumerate(tree)}

    def draw(path: tuple, leaf: Array) -> Array:
        name = path_of(path)
        last = name.rpartition("/")[2].lower()
        if "embed" in last or "position" in last:
            spread = 0.02
        elif name in fan_in or (len(leaf.shape) > 1 and "bias" not in last):
            inputs = fan_in.get(name, int(np.prod(leaf.shape[:-1])))
            spread = inputs**-0.5
        else:
            value = 1.0 if last in ("scale", "weight", "gamma") else 0.0
            return jnp.full(leaf.shape, value, leaf.dtype)
        noise = jax.random.normal(keys[order[name]], leaf.shape, jnp.float32)
        return (spread * noise).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, params)
