"""A step under `autoshard`: finds its plan at the first call of each signature, then runs it like a jitted function."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from typing import Any

import jax
import numpy as np
from jax.sharding import NamedSharding

from ffjax import nnx
from ffjax.cost.cluster import Cluster
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import device_mesh, jitted
from ffjax.errors import ClusterError, PlanError
from ffjax.fingerprint import program_fingerprint
from ffjax.inputs import argnums, cluster_of
from ffjax.ir.trace import Program, function_name
from ffjax.options import StepOptions
from ffjax.plan import Plan
from ffjax.plan_cache import cached_plan
from ffjax.planner import bind_program, plan_program
from ffjax.remat import alternatives, trace_call, under


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One signature of arguments: its plan, bound to its program, and, once it has run, what runs it."""

    plan: Plan
    program: Program
    runner: _Runner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runner:
    """The jitted step, where its arguments go, and the arrays that the step closes over, in place."""

    run: jax.stages.Wrapped
    shardings: tuple[NamedSharding, ...]
    closures: tuple[jax.Array, ...]
    accepted: list[object]
    """For each argument the sharding object that it last came with: the step's own results share theirs."""

    def place(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The arguments where the plan wants them."""
        placed = []
        for i, leaf in enumerate(leaves):
            given = getattr(leaf, "sharding", None)
            if given is not None and given is self.accepted[i]:
                placed.append(leaf)
                continue
            placed.append(place(leaf, self.shardings[i]))
            self.accepted[i] = placed[-1].sharding
        return placed


class Sharded:
    """A step under `autoshard`. Call it like the step; `plan`, `lower` and `init` say and do the rest."""

    def __init__(self, step: Callable[..., Any], options: StepOptions) -> None:
        self._step = step
        self._options = options
        self._entries: dict[Hashable, _Entry] = {}
        self._plain: set[Any] = set()
        """Structures of arguments that are seen to be plain pytrees of arrays."""
        functools.update_wrapper(self, step)

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        """As a method: the instance becomes the first argument, which a plain class makes static."""
        return self if instance is None else types.MethodType(self, instance)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Places the arguments as planned (no copy if they are so already) and runs one step."""
        leaves, tree = jax.tree.flatten((args, kwargs))
        if tree in self._plain and (known := self._entries.get((tree, _kinds(leaves), ()))) and known.runner:
            out = known.runner.run(*known.runner.closures, *known.runner.place(leaves))
            return jax.tree.unflatten(known.program.out_tree, out)
        call = self._call(args, kwargs)
        if call.step is self._step and not call.static_argnums:
            self._plain.add(tree)
        self._check_devices()
        entry = self._entry(call)
        runner = self._runner(entry)
        out = runner.run(*runner.closures, *runner.place(_leaves(call)[0]))
        return call.finish(jax.tree.unflatten(entry.program.out_tree, out))

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, which may be arrays or `jax.ShapeDtypeStruct`."""
        return self._entry(self._call(args, kwargs)).plan

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The sharded step, lowered for the devices that it would run on."""
        return self.plan(*args, **kwargs).lower(self._devices())

    def init(self, init_fn: Callable[..., Any], *args: Any) -> Any:
        """Builds a state already sharded, as the plan wants the argument that it is for: no device holds it whole.

        Plan first (`step.plan(jax.eval_shape(init_fn, *args), batch)`): the state goes where that plan has an argument
        with the same leaves.

        Raises:
          PlanError: before there is a plan, or where the state fits none of the step's arguments.
        """
        name = function_name(self._step)
        if not self._entries:
            raise PlanError(
                f"{name}.init has no plan yet. Remedy: call {name}.plan(jax.eval_shape(init_fn, *args), batch) first."
            )
        entry = next(reversed(self._entries.values()))
        call = nnx.as_builder(init_fn)
        leaves, tree = jax.tree.flatten(jax.eval_shape(call.build, *args))
        shapes = [(tuple(v.shape), str(v.dtype)) for v in leaves]
        shardings = self._runner(entry).shardings
        for root in dict.fromkeys(leaf.root for leaf in entry.program.args):
            own = [(leaf, s) for leaf, s in zip(entry.program.args, shardings, strict=True) if leaf.root == root]
            if [(leaf.shape, leaf.dtype) for leaf, _ in own] == shapes:
                placed = jax.tree.unflatten(tree, [s for _, s in own])
                return call.finish(jax.jit(call.build, out_shardings=placed)(*args))
        raise PlanError(
            f"what {getattr(init_fn, '__name__', 'init_fn')} makes ({len(shapes)} arrays) is none of the arguments of "
            f"the last plan of {name}. Remedy: plan with jax.eval_shape(init_fn, *args) as the state."
        )

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> nnx.Call:
        static = argnums(self._options.static_argnums, len(args), "static_argnums")
        donated = argnums(self._options.donate_argnums, len(args), "donate_argnums")
        return nnx.as_function(self._step, args, kwargs, static, donated)

    def _devices(self) -> Sequence[jax.Device]:
        return jax.devices() if self._options.devices is None else self._options.devices

    def _check_devices(self) -> None:
        """Raises ClusterError before a search whose plan could not run here."""
        options, here = self._options, len(self._devices())
        needed = here if options.search.cluster is None else options.search.cluster.devices
        needed = needed if options.plan is None else options.plan.devices
        if needed > here:
            name = function_name(self._step)
            raise ClusterError(
                f"{name} is to run on {needed} devices, but there are {here}. Remedy: a cluster of {here}, or "
                f"ffjax.testing.fake_devices({needed}) for CPU ones; ffjax.plan and its .lower() need none."
            )

    def _entry(self, call: nnx.Call) -> _Entry:
        """The plan for a call: the one for its signature, or a new one."""
        leaves, tree = _leaves(call)
        static = tuple(call.args[i] for i in call.static_argnums)
        for i, value in zip(call.static_argnums, static, strict=True):
            try:
                hash(value)
            except TypeError as error:
                raise PlanError(
                    f"argument {i} of {function_name(self._step)} is static, but {type(value).__name__} cannot be "
                    "hashed. Remedy: take it out of static_argnums, or pass something that can be (a tuple, a frozen "
                    "dataclass)."
                ) from error
        signature = (tree, _kinds(leaves), static)
        if signature not in self._entries:
            given, remat = self._options.plan, self._options.search.remat
            program = trace_call(call, remat if given is None else given.remat)
            found = self._known(call, program) if given is None else bind_program(given, program)
            self._entries[signature] = _Entry(plan=found, program=found.bound.graph.program)
        return self._entries[signature]

    def _known(self, call: nnx.Call, program: Program) -> Plan:
        """The plan of another signature that traces to the same program (weak types, structure), or one of its own."""
        policies = dict.fromkeys(entry.plan.remat for entry in self._entries.values())
        for same in (under(call, program, policy) for policy in policies):
            wanted = program_fingerprint(same)
            for entry in self._entries.values():
                if (entry.plan.remat, entry.plan.fingerprint) == (same.remat, wanted):
                    return bind_program(entry.plan, same)
        return self._cached(call, program)

    def _runner(self, entry: _Entry) -> _Runner:
        if entry.runner is None:
            layout = entry.plan.bound
            mesh = device_mesh(layout.mesh, self._devices())
            shardings = in_shardings(layout, mesh)
            closures = layout.graph.program.closures
            entry.runner = _Runner(
                run=jitted(layout, mesh),
                shardings=shardings[len(closures) :],
                closures=tuple(place(x, s) for x, s in zip(closures, shardings, strict=False)),
                accepted=[None] * len(shardings[len(closures) :]),
            )
        return entry.runner

    def _cached(self, call: nnx.Call, program: Program) -> Plan:
        """The plan from the cache folder, or a new one, which is then put there."""
        options = self._options.search
        cluster = Cluster.local(self._options.devices) if options.cluster is None else cluster_of(options.cluster)

        def searched() -> Plan:
            asked = dataclasses.replace(options, cluster=cluster)
            return plan_program(program, asked, others=alternatives(call, program, options.remat))

        def bound(plan: Plan) -> Plan:
            return bind_program(plan, under(call, program, plan.remat))

        folder = self._options.cache
        if folder is None:
            return searched()
        return cached_plan(folder, program, options, cluster, bind=bound, search=searched)


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array where the plan wants it; the array itself if it is there.

    One that is there by another name (of a mesh, of an axis) takes the plan's, or `jax.jit` would compile for each.
    """
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    placed: jax.Array = jax.device_put(array, sharding)
    return placed


def _leaves(call: nnx.Call) -> tuple[list[Any], Any]:
    """The leaves of the traced arguments, in the program's order."""
    dynamic = tuple(a for i, a in enumerate(call.args) if i not in call.static_argnums)
    return jax.tree.flatten((dynamic, call.kwargs))


def _kinds(leaves: Sequence[Any]) -> Hashable:
    """What each leaf is to a trace: shape, dtype and whether its type is weak."""
    kinds = []
    for leaf in leaves:
        aval = getattr(leaf, "aval", leaf)
        if not hasattr(aval, "shape"):
            # A Python number; what is no array at all is named when it is traced.
            aval = jax.typeof(leaf) if isinstance(leaf, int | float | complex) else np.zeros(0)
        kinds.append((aval.shape, aval.dtype, getattr(aval, "weak_type", False)))
    return tuple(kinds)
