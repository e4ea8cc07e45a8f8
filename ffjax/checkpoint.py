"""States saved under one plan and restored under another, by Orbax; the plan lies beside the state.

A folder has `state/`, a checkpoint of Orbax's, and `plan.json`. Each process writes and reads the pieces that its own
devices hold, so no host ever has the whole. What this adds to Orbax is little: use Orbax itself for more (asynchronous
saves, retention), with `step.abstract_state(state)` as the target of a restore.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import jax
from jax.sharding import SingleDeviceSharding
from jax.tree_util import keystr

from ffjax import nnx
from ffjax.cost.hardware import parse_bytes
from ffjax.errors import FfjaxError
from ffjax.ir.compat import is_extended, nbytes
from ffjax.ir.trace import abstract
from ffjax.plan import Plan

_STATE, _PLAN = "state", "plan.json"


def save(folder: str | os.PathLike[str], state: Any, *, plan: Plan | None = None) -> None:
    """Saves a state, sharded as it is, and the plan beside it. With several processes each calls it alike.

    Args:
      folder: a new one; the processes share it.
      state: a pytree of arrays; of NNX objects (one, or a tuple of them) their arrays are saved.
      plan: the plan that the state is sharded by.

    Raises:
      FfjaxError: where the folder has a state already.

    >>> save("checkpoints/100", state, plan=step.plan(state, batch))  # doctest: +SKIP
    """
    target = Path(folder).absolute()
    arrays, _ = nnx.as_arrays(state)
    try:
        with _orbax().StandardCheckpointer() as checkpointer:
            checkpointer.save(target / _STATE, arrays)
    except ValueError as error:
        if "already exists" not in str(error):
            raise
        raise FfjaxError(
            f"{os.fspath(folder)!r} has a state already. Remedy: save into a new folder, one for each step."
        ) from error
    if plan is not None and jax.process_index() == 0:
        plan.save(target / _PLAN)


def restore(folder: str | os.PathLike[str], target: Any, *, host_memory: str | float = "4GiB") -> Any:
    """Reads a state, each device just its own piece, however it was sharded when it was saved.

    Args:
      folder: what `save` was given.
      target: what each array shall be: `step.abstract_state(state)` for a plan, `on_device(state)` for one device.
      host_memory: bytes (`"4GiB"` or a number) of pieces on their way to the devices that a process holds at most; but
        always as many as one array takes to be read, which is up to twice its size.

    Returns:
      The state, shaped like `target`. Arrays of NNX objects go back by `flax.nnx.update(model, restored)`.

    Raises:
      FfjaxError: where there is no state, or one of other arrays.

    >>> state = restore("checkpoints/100", step.abstract_state(jax.eval_shape(init, key)))  # doctest: +SKIP
    """
    path = Path(folder).absolute() / _STATE
    if not path.exists():
        raise FfjaxError(
            f"{os.fspath(folder)!r} has no saved state. Remedy: the folder that checkpoint.save was given."
        )
    largest = max((nbytes(leaf.shape, leaf.dtype) for leaf in jax.tree.leaves(target)), default=0.0)
    # What is read at once must be less than Orbax's limit; whole chunks are read, which may reach over an array's end.
    limit_bytes = max(parse_bytes(host_memory), 2 * largest + 1)
    with _orbax().StandardCheckpointer(restore_concurrent_gb=limit_bytes / 1e9) as checkpointer:
        if wrong := _differences(checkpointer.metadata(path).item_metadata, target):
            more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
            raise FfjaxError(
                f"the state in {os.fspath(folder)!r} is not the one asked for: {'; '.join(wrong[:5])}{more}. Remedy: a "
                "target with the paths, shapes and dtypes that were saved."
            )
        return checkpointer.restore(path, target)


def _differences(saved: Any, target: Any) -> list[str]:
    """What of a target is not as it was saved. Orbax itself would convert dtypes without a word."""

    def kinds(tree: Any) -> dict[str, tuple[tuple[int, ...], str]]:
        flat = jax.tree_util.tree_flatten_with_path(tree)[0]
        return {keystr(path, simple=True, separator="/"): (tuple(leaf.shape), str(leaf.dtype)) for path, leaf in flat}

    # Of typed PRNG keys the words are saved.
    words = jax.tree.map(lambda v: jax.eval_shape(jax.random.key_data, v) if is_extended(v.dtype) else v, target)
    there, wanted = kinds(saved), kinds(words)
    return (
        [f"it has no {path}" for path in wanted if path not in there]
        + [f"it has {path}" for path in there if path not in wanted]
        + [
            f"{path} is {there[path][1]}{list(there[path][0])} there, not {dtype}{list(shape)}"
            for path, (shape, dtype) in wanted.items()
            if path in there and there[path] != (shape, dtype)
        ]
    )


def saved_plan(folder: str | os.PathLike[str]) -> Plan:
    """The plan that was saved beside a state; raises PlanError where there is none."""
    return Plan.load(Path(folder) / _PLAN)


def on_device(state: Any, device: jax.Device | None = None) -> Any:
    """The target of a restore onto one device, by default this process's first: for a laptop, or for evaluation.

    Args:
      state: arrays, or what has their shapes and dtypes.
    """
    sharding = SingleDeviceSharding(device or jax.local_devices()[0])
    arrays, _ = nnx.as_arrays(state)

    def described(leaf: Any) -> jax.ShapeDtypeStruct:
        known = abstract(leaf, "the state")
        return jax.ShapeDtypeStruct(known.shape, known.dtype, sharding=sharding)

    return jax.tree.map(described, arrays)


def _orbax() -> Any:
    try:
        import orbax.checkpoint
    except ImportError as error:
        raise FfjaxError("checkpoints need Orbax. Remedy: pip install 'ffjax[checkpoint]'.") from error
    return orbax.checkpoint
