"""Where a plan wants the arguments of its step: states are placed, moved and described by it, batches are handed over.

A state is found among the arguments by the paths, shapes and dtypes of its leaves; it may be an argument, a part of one
(`state.params`), or a tuple of these. Nothing here needs the program: a plan that was loaded from a file will do.
"""

from __future__ import annotations

import collections
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding
from jax.tree_util import keystr, tree_flatten_with_path

from ffjax import nnx
from ffjax.emit.emit import partition_spec
from ffjax.emit.run import device_mesh
from ffjax.errors import PlanError
from ffjax.ir.trace import Program, abstract
from ffjax.placing import place, process_shape
from ffjax.plan_record import Placement, PlanRecord

_T = TypeVar("_T")
Key = tuple[str, tuple[int, ...], str]
"""Path, shape and dtype of a leaf."""


class Places:
    """The arguments of a plan's step, on devices of which the plan takes the first."""

    def __init__(self, plan: PlanRecord, devices: Sequence[jax.Device]) -> None:
        self.program = plan.program
        self.args = plan.args
        self.mesh = device_mesh(plan.mesh, devices)
        self.shardings = [NamedSharding(self.mesh, partition_spec(p.spec)) for p in plan.args]
        self.within: dict[str, list[int]] = {}
        """For each argument and each part of one the indices of its leaves."""
        for index, arg in enumerate(plan.args):
            parts = arg.path.split("/")
            for end in range(len(parts)):
                self.within.setdefault("/".join(parts[: end + 1]), []).append(index)

    def of(self, tree: Any, argument: str | None = None) -> list[NamedSharding]:
        """The shardings of a state's leaves, in their order.

        Args:
          tree: the state: arrays, or what has their shapes and dtypes.
          argument: the path of the argument, or part, that it is for; by default the first one that fits.

        Raises:
          PlanError: where it fits none.
        """
        keys = _keys(tree)
        if argument is not None:
            if argument not in self.within:
                raise PlanError(f"{argument!r} is no argument of {self.program}. Remedy: one of {self._arguments()}.")
            found = self._fit(keys, [argument], set())
        else:
            # As one argument or part, else as several side by side, else by shapes alone (another container).
            found = self._fit(keys, self.within, set()) or self._side_by_side(keys) or self._by_shapes(keys)
        if found is None:
            named = self._arguments() if argument is None else argument
            raise PlanError(
                f"the state ({len(keys)} arrays: {_shown(keys)}) is no argument of {self.program}, nor a part of one: "
                f"{named}. Remedy: a plan for this state (plan with its shapes), or the state of this plan."
            )
        return [self.shardings[i] for i in found]

    def place_state(self, tree: Any, argument: str | None = None, *, donate: bool = False) -> Any:
        """See `Sharded.place_state`."""
        arrays, finish = nnx.as_arrays(tree)
        shardings = self.of(arrays, argument)
        leaves, structure = jax.tree.flatten(arrays)
        placed = []
        for leaf, sharding in zip(leaves, shardings, strict=True):
            placed.append(place(leaf, sharding, alias=False))
            if donate and isinstance(leaf, jax.Array) and leaf is not placed[-1]:
                leaf.delete()
        return finish(jax.tree.unflatten(structure, placed))

    def abstract_state(self, tree: Any, argument: str | None = None) -> Any:
        """See `Sharded.abstract_state`."""
        arrays, _ = nnx.as_arrays(tree)
        leaves, structure = jax.tree.flatten(arrays)
        described = [
            jax.ShapeDtypeStruct(np.shape(leaf), abstract(leaf, "the state").dtype, sharding=sharding)
            for leaf, sharding in zip(leaves, self.of(arrays, argument), strict=True)
        ]
        return jax.tree.unflatten(structure, described)

    def place_batch(self, batch: Any, arguments: Sequence[str]) -> Any:
        """A host's batch on the devices; `arguments` are the paths of the arguments that it is, one for each element.

        One argument takes the batch as it is, several take a tuple. See `Sharded.place_batch`.
        """
        if len(arguments) == 1:
            return self._place_argument(batch, arguments[0])
        if not isinstance(batch, (tuple, list)) or len(batch) != len(arguments):
            given = f"{len(batch)} elements" if isinstance(batch, (tuple, list)) else type(batch).__name__
            raise PlanError(
                f"{self.program} takes {len(arguments)} arguments besides its state ({', '.join(arguments)}), but the "
                f"batch is {given}. Remedy: a tuple of them, or arguments= with the name of the one that it is."
            )
        return tuple(self._place_argument(part, name) for part, name in zip(batch, arguments, strict=True))

    def _place_argument(self, tree: Any, name: str) -> Any:
        if name not in self.within:
            raise PlanError(f"{name!r} is no argument of {self.program}. Remedy: one of {self._arguments()}.")
        wanted = {self._inside(i, name): i for i in self.within[name]}
        flat, structure = tree_flatten_with_path(tree)
        paths = [_path(path) for path, _ in flat]
        if set(paths) != wanted.keys() or len(paths) != len(wanted):
            raise PlanError(
                f"the batch has {', '.join(map(repr, paths))}, but {name} of {self.program} has "
                f"{', '.join(map(repr, wanted))}. Remedy: the batch as the step takes it."
            )
        leaves = [self._place_leaf(leaf, wanted[path], name) for path, (_, leaf) in zip(paths, flat, strict=True)]
        return jax.tree.unflatten(structure, leaves)

    def _place_leaf(self, leaf: Any, index: int, name: str) -> jax.Array:
        arg, sharding = self.args[index], self.shardings[index]
        given = abstract(leaf, f"{name} of {self.program}: {arg.path}")
        own = process_shape(arg.shape, sharding)
        rows = tuple(given.shape)
        dtype = str(jax.dtypes.canonicalize_dtype(given.dtype)) if isinstance(leaf, np.ndarray) else str(given.dtype)
        fits = len(rows) == len(arg.shape) and all(n in pair for n, *pair in zip(rows, arg.shape, own, strict=True))
        if not fits or dtype != arg.dtype:
            per_process = "" if own == arg.shape else f", or {list(own)}, the rows of this process"
            raise PlanError(
                f"{arg.path} of the batch is {dtype}{list(rows)}, but the plan of {self.program} is for "
                f"{arg.dtype}{list(arg.shape)}{per_process}. Remedy: a batch of that shape, or a plan for this one."
            )
        if rows == arg.shape:
            return place(leaf, sharding)
        made: jax.Array = jax.make_array_from_process_local_data(
            sharding, np.asarray(leaf).astype(arg.dtype, copy=False), arg.shape
        )
        return made

    def _fit(self, keys: Sequence[Key], among: Iterable[str], taken: set[str]) -> list[int] | None:
        """The leaves of the first of some arguments and parts that have just these paths, shapes and dtypes."""
        for name in among:
            indices = self.within[name]
            if name not in taken and len(indices) == len(keys):
                own = {(self._inside(i, name), self.args[i].shape, self.args[i].dtype): i for i in indices}
                if all(key in own for key in keys):
                    taken.add(name)
                    return [own[key] for key in keys]
        return None

    def _side_by_side(self, keys: Sequence[Key]) -> list[int] | None:
        """The same for a tuple of arguments or parts."""
        elements: dict[str, list[Key]] = {}
        for path, shape, dtype in keys:
            first, _, rest = path.partition("/")
            elements.setdefault(first, []).append((rest, shape, dtype))
        taken: set[str] = set()
        found = [self._fit(own, self.within, taken) for own in elements.values()]
        return [i for own in found for i in own] if all(found) else None  # type: ignore[union-attr]

    def _by_shapes(self, keys: Sequence[Key]) -> list[int] | None:
        shapes = [key[1:] for key in keys]
        roots = [indices for name, indices in self.within.items() if "/" not in name]
        return next((own for own in roots if [self._kind(self.args[i]) for i in own] == shapes), None)

    def _kind(self, arg: Placement) -> tuple[tuple[int, ...], str]:
        return arg.shape, arg.dtype

    def _inside(self, index: int, name: str) -> str:
        return self.args[index].path[len(name) :].lstrip("/")

    def _arguments(self) -> str:
        return ", ".join(name for name in self.within if "/" not in name)


def batch_arguments(program: Program) -> tuple[str, ...]:
    """The arguments of which no leaf is returned for the next step."""
    state = {program.args[arg].root for arg, _ in program.ties}
    return tuple(dict.fromkeys(leaf.root for leaf in program.args if leaf.root not in state))


def prefetched(items: Iterable[_T], ahead: int) -> Iterator[_T]:
    """The items, of which `ahead` are made before they are asked for."""
    made = iter(items)
    queue = collections.deque(itertools.islice(made, ahead))
    while queue:
        yield queue.popleft()
        queue.extend(itertools.islice(made, 1))


def _keys(tree: Any) -> list[Key]:
    keys = []
    for path, leaf in tree_flatten_with_path(tree)[0]:
        known = abstract(leaf, f"the state's {_path(path)}")
        keys.append((_path(path), tuple(known.shape), str(known.dtype)))
    return keys


def _shown(keys: Sequence[Key]) -> str:
    shown = [f"{path or 'array'} {dtype}{list(shape)}" for path, shape, dtype in keys[:3]]
    return ", ".join(shown) + (", ..." if len(keys) > len(shown) else "")


def _path(path: Sequence[Any]) -> str:
    return keystr(tuple(path), simple=True, separator="/")
