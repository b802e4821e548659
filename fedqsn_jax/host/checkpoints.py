"""Checkpoints of a run: its state and its metrics history, one directory a round.

The only file that knows Orbax. A checkpoint is written under a temporary name and renamed when it
is whole, so an interrupted save leaves nothing that counts as one, and state and history are always
of the same round. It holds four items:

- ``state``: the tensors as plain arrays, by name; typed keys as their key data.
- ``tensors``: what those are, ``{"types": {"params/kernel": "float32[64,10]"}, "keys": {...}}``, so
  that a state that does not fit is refused in one line before anything large is read; and a digest
  of all that, so that no changed bit goes unnoticed.
- ``history``: the metrics' history since the last full chunk, and which chunks come before; see
  `history`, which keeps them in ``history/``. Checkpoints of earlier versions hold all of it, a
  JSON list.
- ``metrics``: the score, by which Orbax keeps the best. It stands in ``tensors`` too, so that the
  digest covers it.

Orbax gets host arrays only: a checkpoint does not depend on the devices that wrote it. Where
several processes run, all of them save together, in a directory that all of them see: process 0
writes, and Orbax lets none go on before the others are ready. Each reads by itself.
"""

import contextlib
import json
import math
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

import jax
import numpy as np
from absl import logging as absl_logging
from orbax.checkpoint import v1 as ocp

from fedqsn_jax.host.checkpoint_contents import (
    DIGEST,
    CheckpointError,
    digest_of,
    facts_of,
    first_difference,
    first_reason,
    host_array,
    is_key,
    named_leaves,
    type_of,
    unreadable,
)
from fedqsn_jax.host.history import ChunkedHistory, History, HistoryError
from fedqsn_jax.host.orbax_silence import OrbaxSilence, failures_told_once

State = TypeVar("State")
"""A pytree of arrays: jax arrays of plain dtypes and typed pseudo-random keys."""

_STATE = "state"
_TENSORS = "tensors"
_HISTORY = "history"
_SCORE = "score"
_METRICS = "metrics"


class Checkpoints:
    """The checkpoints of one run: the latest, and the best by their score.

    It is a context manager. Leaving it waits for the save in flight. Nothing is created before the
    first save, which also removes what an interrupted save left behind; so a second process may
    look at the checkpoints of a run that goes on.

    Example:
      >>> import tempfile
      >>> import jax.numpy as jnp
      >>> state = {"weights": jnp.arange(3.0)}
      >>> with Checkpoints(tempfile.mkdtemp(), keep_latest=2, keep_best=1) as checkpoints:
      ...     checkpoints.save(5, state, [{"round": 5}], score=0.5)
      ...     checkpoints.latest_round()
      ...     checkpoints.restore(like=state)
      5
      ({'weights': Array([0., 1., 2.], dtype=float32)}, [{'round': 5}])
    """

    def __init__(self, directory: Path | str, keep_latest: int, keep_best: int):
        """Names the directory, and touches nothing.

        Args:
          directory: Where the checkpoints lie, or will.
          keep_latest: The number of latest checkpoints that are kept, at least 1.
          keep_best: The checkpoints with the highest scores that are kept too; of equal scores the
            later. The latest may be among them.
        """
        self._directory = Path(directory).absolute()
        self._keep_latest = keep_latest
        self._keep_best = keep_best
        self._names = ocp.path.step.standard_name_format()
        self._chunks = ChunkedHistory(self._directory / _HISTORY)
        self._writer: ocp.training.Checkpointer | None = None
        # The round of the save that may still be in flight, and Orbax's handle on it.
        self._pending: tuple[int, Any] | None = None
        self._unheard = contextlib.ExitStack()
        self._silence = OrbaxSilence()
        absl_logging.get_absl_logger().addFilter(self._silence)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        exception_type: type[BaseException] | None,
        exception: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    def rounds(self) -> list[int]:
        """Returns the rounds that have a checkpoint, ascending, after the save in flight.

        Raises:
          CheckpointError: The save in flight failed.
        """
        self.wait()
        return sorted(step.step for step in self._names.find_all(self._directory))

    def latest_round(self) -> int | None:
        """Returns the last round that has a checkpoint, or None.

        Raises:
          CheckpointError: The save in flight failed.
        """
        return max(self.rounds(), default=None)

    def save(self, round: int, state: Any, history: History, score: float) -> None:
        """Saves a checkpoint, in the background, unless the round has one already.

        The arguments are copied to the host before this returns: the state's buffers may be
        donated and the history may grow. A save that is still in flight is waited for.

        Args:
          round: The number of finished rounds.
          state: A pytree of arrays.
          history: JSON objects: those of the last save, or of what was restored, and more. What
            was saved once is not looked at again, so that a save costs the same at any round.
          score: The higher, the better; NaN is the worst.

        Raises:
          CheckpointError: This save could not begin, or the one in flight failed.
          TypeError: A leaf of the state is no array, or the history is no JSON.
          ValueError: The state has no tensors, or two of one name.
        """
        leaves = named_leaves(state)
        if round in self.rounds():
            return
        keys = {name: leaf for name, leaf in leaves.items() if is_key(leaf)}
        # The score as text: JSON has no NaN.
        tensors = {**facts_of(leaves), _SCORE: repr(float(score))}
        plain = leaves | {name: jax.random.key_data(key) for name, key in keys.items()}
        # Orbax refuses empty arrays; their type says all about them.
        plain = {name: leaf for name, leaf in plain.items() if leaf.size}
        if not plain:
            # Orbax would refuse it too, but only after it has started threads, which then hang.
            raise ValueError("the state has no tensors to save")
        try:
            rest = self._chunks.store(history, write=jax.process_index() == 0)
            # On a CPU device_get gives views of the devices' own memory. Orbax copies them before
            # it returns: deepcopy_host_arrays, in the context of the writer.
            host = jax.device_get(plain)
            tensors[DIGEST] = digest_of(tensors, host, rest)
            items = {_STATE: host, _TENSORS: tensors, _HISTORY: rest}
            self._unheard = contextlib.ExitStack()
            self._unheard.enter_context(failures_told_once(self._directory))
            response = self._open_writer().save_checkpointables_async(
                round, items, metrics={_SCORE: float(score)}, force=True
            )
        except TypeError:
            raise
        except Exception as error:
            self._close_writer()
            raise self._unwritten(round, error) from error
        self._pending = round, response

    def restore(self, like: State, round: int | None = None) -> tuple[State, History]:
        """Returns what a checkpoint holds: arrays on the default device, none weakly typed.

        Args:
          like: The state that is expected, arrays or `jax.ShapeDtypeStruct`.
          round: Which checkpoint; None is the latest.

        Raises:
          CheckpointError: There is no such checkpoint, it cannot be read, or it holds a state of
            another structure, shape or dtype.
        """
        expected = {name: type_of(leaf) for name, leaf in named_leaves(like).items()}
        path, round, rounds = self._find(round)
        try:
            tensors = _load(path, _TENSORS)[_TENSORS]
            stored, implementations = dict(tensors["types"]), dict(tensors["keys"])
        except Exception as error:
            raise unreadable(path, round, rounds, error) from error
        difference = first_difference(stored, expected)
        if difference:
            raise CheckpointError(f"{path}: {difference}")
        try:
            self._check_scores(rounds)
            state, history = self._load_checked(path, tensors)
            host = {
                name: host_array(name, state, leaf) for name, leaf in named_leaves(like).items()
            }
        except CheckpointError:
            raise
        except Exception as error:
            raise unreadable(path, round, rounds, error) from error
        arrays = jax.device_put(host)
        for name, implementation in implementations.items():
            arrays[name] = jax.random.wrap_key_data(arrays[name], impl=implementation)
        leaves = [arrays[name] for name in expected]
        return jax.tree.unflatten(jax.tree.structure(like), leaves), history

    def read(
        self, prefix: str, round: int | None = None
    ) -> tuple[dict[str, np.ndarray], History, int]:
        """Returns a part of a state without knowing the rest.

        Args:
          prefix: For example ``params``: the tensors whose names begin with ``params/``.
          round: Which checkpoint; None is the latest.

        Returns:
          Host arrays by what follows the prefix, the history, and the checkpoint's round.

        Raises:
          CheckpointError: There is no such checkpoint, or it cannot be read.
        """
        path, round, rounds = self._find(round)
        try:
            state, history = self._load_checked(path, _load(path, _TENSORS)[_TENSORS])
        except CheckpointError:
            raise
        except Exception as error:
            raise unreadable(path, round, rounds, error) from error
        prefix = f"{prefix}/"
        found = {name: array for name, array in state.items() if name.startswith(prefix)}
        arrays = {name.removeprefix(prefix): np.asarray(array) for name, array in found.items()}
        return arrays, history, round

    def _load_checked(self, path: Path, tensors: dict[str, Any]) -> tuple[dict[str, Any], History]:
        """Loads state and history; ValueError unless they are what was saved, to the last bit."""
        loaded = _load(path, _STATE, _HISTORY)
        state, history = loaded[_STATE], loaded[_HISTORY]
        if digest_of(tensors, state, history) != tensors[DIGEST]:
            raise ValueError("its digest is not that of its contents")
        if isinstance(history, list):
            return state, history
        try:
            return state, self._chunks.load(history)
        except HistoryError as error:
            raise CheckpointError(
                f"{error}; it is a part of the metrics' history that every checkpoint after it "
                f"needs: put it back from a copy, or start from the beginning in another directory"
            ) from error

    def _check_scores(self, rounds: list[int]) -> None:
        """Makes sure that the next save, for which Orbax reads all scores, can read them.

        Raises:
          CheckpointError: One is damaged.
        """
        for round in rounds:
            path = self._directory / self._names.build_name(round)
            if not (path / _METRICS).exists():
                # As a deletion that was interrupted leaves it; Orbax forgets such a checkpoint.
                continue
            try:
                # Orbax keeps this item to itself, and has no call that reads it alone.
                score = float(json.loads((path / _METRICS / _METRICS).read_bytes())[_SCORE])
                # Those of earlier versions hold no other.
                saved = _load(path, _TENSORS)[_TENSORS].get(_SCORE, repr(score))
                if repr(score) != saved:
                    raise ValueError(f"it is {score!r}, but {saved} was saved")
            except Exception as error:
                raise CheckpointError(
                    f"{path}: its score cannot be read ({first_reason(error)}); if it is damaged, "
                    f"move or remove that directory, and the run goes on without that checkpoint"
                ) from error

    def _find(self, round: int | None) -> tuple[Path, int, list[int]]:
        """The path and round of a checkpoint, by default the latest, and all rounds."""
        rounds = self.rounds()
        if not rounds or (round is not None and round not in rounds):
            which = "" if round is None else f" of round {round}"
            there = f"; there are those of {', '.join(map(str, rounds))}" if rounds else ""
            raise CheckpointError(f"{self._directory}: there is no checkpoint{which}{there}")
        round = rounds[-1] if round is None else round
        return self._directory / self._names.build_name(round), round, rounds

    def wait(self, timeout: float | None = None) -> None:
        """Waits until the save in flight is on disk.

        Raises:
          TimeoutError: It is not over after ``timeout`` seconds.
          CheckpointError: It failed. It is reported once, and later saves start afresh.
        """
        if self._pending is None:
            return
        round, response = self._pending
        try:
            response.result(timeout)
        except Exception as error:
            if timeout is not None and isinstance(error, TimeoutError):
                raise
            self._pending = None
            self._close_writer()
            raise self._unwritten(round, error) from error
        self._pending = None
        # After a failure what follows stays unheard: it may come at any time.
        self._unheard.close()

    def raise_failure(self) -> None:
        """Raises at once what has become of the save in flight, if it has failed by now.

        Raises:
          CheckpointError: It failed; as `wait`.
        """
        if self._pending is not None:
            with contextlib.suppress(TimeoutError):
                self.wait(timeout=0)

    def close(self) -> None:
        """Waits, and ends Orbax's threads.

        Raises:
          CheckpointError: The save in flight failed.
        """
        try:
            self.wait()
        finally:
            self._close_writer()
            absl_logging.get_absl_logger().removeFilter(self._silence)

    def _open_writer(self) -> ocp.training.Checkpointer:
        if self._writer is None:
            context = ocp.Context()
            context.memory.deepcopy_host_arrays = True
            # Where one cannot be made, threads that wait for it would outlive the error by minutes.
            context.asynchronous.create_directories_asynchronously = False
            # By itself Orbax would take lists and dictionaries for pytrees of scalars.
            registry = ocp.handlers.local_registry()
            for name in (_TENSORS, _HISTORY):
                registry.add(ocp.handlers.JsonHandler, checkpointable_name=name)
            context.checkpointables.registry = registry
            policies = ocp.training.preservation_policies
            self._writer = ocp.training.Checkpointer(
                self._directory,
                context=context,
                preservation_policy=policies.AnyPreservationPolicy(
                    [
                        policies.LatestN(self._keep_latest),
                        policies.BestN(
                            get_metric_fn=_sortable_score,
                            n=self._keep_best,
                            # Only a deletion that was interrupted leaves one without.
                            keep_checkpoints_without_metrics=False,
                        ),
                    ]
                ),
                cleanup_tmp_directories=True,
            )
        return self._writer

    def _close_writer(self) -> None:
        writer, self._writer = self._writer, None
        if writer is None:
            return
        # What failed has been reported; Orbax would raise it again when it closes.
        with contextlib.suppress(Exception):
            writer.wait()
        with contextlib.suppress(Exception):
            writer.close()

    def _unwritten(self, round: int, error: Exception) -> CheckpointError:
        return CheckpointError(
            f"{self._directory}: the checkpoint of round {round} could not be written "
            f"({first_reason(error)})"
        )


def _load(path: Path, *items: str) -> dict[str, Any]:
    """Reads in this process, without waiting for others."""
    this = jax.process_index()
    alone = ocp.options.MultiprocessingOptions(primary_host=this, active_processes={this})
    context = ocp.Context(multiprocessing_options=alone if jax.process_count() > 1 else None)
    with failures_told_once(path), context:
        return ocp.load_checkpointables(path, dict.fromkeys(items))


def _sortable_score(metrics: dict[str, float]) -> float:
    return -math.inf if math.isnan(metrics[_SCORE]) else metrics[_SCORE]
