"""Measures how far gradients in bfloat16 are from float32's, with the kernels for GPUs and without.

  python tests/figures/gradients.py --config.data.train=tsv:sst2/train.tsv \\
    --config.data.test=tsv:sst2/dev.tsv

MiniLM of configs/sst2_minilm.py and the first rows of its test data; its head is drawn at random.
Without a GPU Pallas interprets the kernels. Printed are relative distances: of all tensors' values
together, and the mean over tensors (but for keys' biases, whose gradients are zero).
"""

import argparse

import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict

from fedqsn_jax.config.command_line import read_config
from fedqsn_jax.models.kernels import gpu_blocks
from fedqsn_jax.models.language.families import make_language_model
from fedqsn_jax.models.language.pretrained import read_config as read_settings
from fedqsn_jax.models.language.transformer import Execution
from fedqsn_jax.problems.problem import problem_settings
from fedqsn_jax.runs.experiment import load_problem

VARIANTS = {"plain bfloat16": False, "with the kernels": True}


def main() -> None:
    """Measures and prints."""
    parser = argparse.ArgumentParser(description=__doc__, allow_abbrev=False)
    parser.add_argument("--rows", type=int, default=16)
    options, flags = parser.parse_known_args()
    config = read_config("configs/sst2_minilm.py", flags)
    problem = load_problem(problem_settings(config))
    batch = {name: rows[: options.rows] for name, rows in problem.splits.test.items()}
    architecture = read_settings(config.model.pretrained, classes=2, pooling=config.model.pooling)
    valid = jnp.ones(options.rows, bool)

    def gradient(dtype: str, kernels: bool) -> dict[str, np.ndarray]:
        gpu_blocks.applies = lambda: kernels
        model = make_language_model(architecture, Execution(dtype))

        def loss(params):
            return problem.task.loss(model.apply_fn(params, batch, None), batch, valid)

        with jax.default_matmul_precision("highest" if dtype == "float32" else "default"):
            found = jax.jit(jax.grad(loss))(problem.params)
        return {path: np.asarray(leaf) for path, leaf in flatten_dict(found, sep="/").items()}

    print(f"jax {jax.__version__}, {jax.devices()[0].device_kind}, {options.rows} rows")
    exact = gradient("float32", False)
    for name, kernels in VARIANTS.items():
        found = gradient("bfloat16", kernels)
        squares = {path: np.square(found[path] - leaf).sum() for path, leaf in exact.items()}
        sizes = {path: np.square(leaf).sum() for path, leaf in exact.items()}
        whole = np.sqrt(sum(squares.values()) / sum(sizes.values()))
        each = [np.sqrt(squares[path] / sizes[path]) for path in exact if "key/bias" not in path]
        print(f"{name}: {whole:.2%} in all, {np.mean(each):.2%} on average over tensors")


if __name__ == "__main__":
    main()
