"""What a checkpoint holds, and how it is told from another: names, types, digests, reasons."""

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

DIGEST = "digest"
"""The name of the digest among the facts that it covers."""


class CheckpointError(ValueError):
    """A checkpoint that cannot be written, read or used; the message is one line."""


def named_leaves(tree: Any) -> dict[str, Any]:
    """Returns the leaves of a state by their paths.

    Raises:
      TypeError: A leaf is no jax array.
      ValueError: Two have one name.
    """
    named: dict[str, Any] = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(tree):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        if name in named:
            raise ValueError(f"two tensors of the state have the name {name}")
        if not isinstance(leaf, jax.Array | jax.ShapeDtypeStruct):
            raise TypeError(f"{name} is of type {type(leaf).__name__}; allowed are jax arrays")
        named[name] = leaf
    return named


def is_key(leaf: Any) -> bool:
    """Whether a leaf is an array of typed pseudo-random keys."""
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def type_of(leaf: Any) -> str:
    """Returns dtype and shape as text: ``float32[64,10]``."""
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def facts_of(leaves: dict[str, Any]) -> dict[str, Any]:
    """Returns what tells a state from others: the types of its tensors, the kinds of its keys."""
    keys = {name: leaf for name, leaf in leaves.items() if is_key(leaf)}
    return {
        "types": {name: type_of(leaf) for name, leaf in leaves.items()},
        "keys": {name: str(jax.random.key_impl(key)) for name, key in keys.items()},
    }


def digest_of(tensors: dict[str, Any], state: dict[str, Any], history: Any) -> str:
    """Returns the BLAKE2b of what a checkpoint holds, but for the digest itself."""
    facts = {name: fact for name, fact in tensors.items() if name != DIGEST}
    digest = hashlib.blake2b(json.dumps([facts, history], sort_keys=True).encode(), digest_size=32)
    for name in sorted(state):
        # As bytes: NumPy gives no buffer of dtypes that are not its own, such as bfloat16.
        digest.update(np.ascontiguousarray(state[name]).reshape(-1).view(np.uint8).data)
    return digest.hexdigest()


_COPIED = re.compile("attackers/[^/]*/copy/")


def first_difference(stored: dict[str, str], expected: dict[str, str]) -> str | None:
    """Returns in words the first tensor that is not as expected, or None.

    Checkpoints of older versions also hold attackers' copies of frozen tensors, which need no copy.
    """
    for name, type_ in expected.items():
        if name not in stored:
            return f"{name} is not stored, but {type_} is expected"
        if stored[name] != type_:
            return f"{name} is stored as {stored[name]}, but {type_} is expected"
    for name, type_ in stored.items():
        if name not in expected and not _COPIED.match(name):
            return f"{name} is stored as {type_}, but not expected"
    return None


def host_array(name: str, loaded: dict[str, Any], like: Any) -> np.ndarray:
    """Returns the array that was loaded, having made sure that it is what the checkpoint said."""
    plain = jax.eval_shape(jax.random.key_data, like) if is_key(like) else like
    array = loaded[name] if plain.size else np.zeros(plain.shape, plain.dtype)
    if type_of(array) != type_of(plain):
        raise ValueError(f"{name} is {type_of(array)}")
    return array


def first_reason(error: BaseException) -> str:
    """Returns what went wrong first: what Orbax wraps around it tells of its own handlers."""
    chain: list[BaseException] = []
    inner: BaseException | None = error
    # An exception that is raised again can come to stand in its own chain.
    while inner is not None and inner not in chain:
        chain.append(inner)
        inner = inner.__cause__ or (None if inner.__suppress_context__ else inner.__context__)
    error = chain[-1]
    text = " ".join(str(error).split()).partition(" [tensorstore_spec=")[0]
    # TensorStore tells the place first and the reason last.
    text = text if len(text) <= 300 else f"{text[:80]} ... {text[-200:]}"
    return f"{type(error).__name__}: {text}"


def unreadable(path: Path, round: int, rounds: list[int], error: Exception) -> CheckpointError:
    """Returns what is told of a checkpoint that cannot be read, and what to do."""
    earlier = [other for other in rounds if other < round]
    goal = f"resume from round {earlier[-1]}" if earlier else "start from the beginning"
    return CheckpointError(
        f"{path}: this checkpoint cannot be read ({first_reason(error)}); "
        f"if it is damaged, move or remove that directory to {goal}"
    )
