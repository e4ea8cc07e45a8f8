"""`ffjax.autoshard`: a step that plans itself at its first call, then runs sharded like a jitted function."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import os
import types
import warnings
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, overload

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from ffjax import nnx
from ffjax.cost.cluster import Cluster
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import device_mesh, jitted
from ffjax.errors import ClusterError, FfjaxWarning, PlanError, TraceError
from ffjax.fingerprint import program_fingerprint
from ffjax.inputs import argnums, cluster_of
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.trace import Program, function_name
from ffjax.plan import Plan
from ffjax.planner import NEVER, bind_program, plan_program
from ffjax.remat import alternatives, check_remat, trace_call, under
from ffjax.strategies.search import Progress
from ffjax.strategies.session import AUTO


@dataclass(frozen=True, slots=True, kw_only=True)
class Options:
    """What `autoshard` was given; see there."""

    cluster: Cluster | None
    memory: str | float | None
    strategy: str
    mesh: Mapping[str, int] | None
    pins: Mapping[str, PartitionSpec] | None
    verify: str
    remat: str
    plan: Plan | None
    cache: str | os.PathLike[str] | None
    static_argnums: int | Sequence[int]
    donate_argnums: int | Sequence[int]
    devices: Sequence[jax.Device] | None
    progress: Progress | None


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
    donates: bool

    def place(self, leaves: Sequence[Any]) -> list[jax.Array]:
        """The arguments where the plan wants them."""
        if self.donates:
            leaves = apart(leaves)
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

    def __init__(self, step: Callable[..., Any], options: Options) -> None:
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
        needed = options.cluster.devices if options.cluster is not None else here
        needed = options.plan.devices if options.plan is not None else needed
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
            given, remat = self._options.plan, self._options.remat
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
                donates=any(layout.graph.program.donated),
            )
        return entry.runner

    def _cached(self, call: nnx.Call, program: Program) -> Plan:
        """The plan from the cache folder, or a new one, which is then put there."""
        options = self._options
        cluster = Cluster.local(options.devices) if options.cluster is None else cluster_of(options.cluster)

        def searched() -> Plan:
            return plan_program(
                program,
                cluster=cluster,
                memory=options.memory,
                strategy=options.strategy,
                mesh=options.mesh,
                pins=options.pins,
                verify=options.verify,
                others=alternatives(call, program, options.remat),
                progress=options.progress,
            )

        if options.cache is None:
            return searched()
        priced = (dataclasses.replace(cluster, profile=None), cluster.profile and cluster.profile.digest)
        asked = (*priced, options.memory, options.strategy, options.mesh, options.pins, options.verify, options.remat)
        digest = hashlib.blake2b(repr((program_fingerprint(program), *asked)).encode(), digest_size=10).hexdigest()
        path = Path(options.cache) / f"{program.name}-{digest}.json"
        if path.exists():
            try:
                cached = Plan.load(path)
                return bind_program(cached, under(call, program, cached.remat))
            except PlanError as error:
                warnings.warn(
                    f"the cached plan cannot be used and is searched again: {error}", FfjaxWarning, stacklevel=5
                )
        found = searched()
        try:
            found.save(path)
        except OSError as error:
            warnings.warn(
                f"the plan could not be put into cache={os.fspath(options.cache)!r}: {error.strerror}. Remedy: name a "
                "folder that can be written.",
                FfjaxWarning,
                stacklevel=5,
            )
        return found


def place(array: Any, sharding: NamedSharding) -> jax.Array:
    """An array where the plan wants it; the array itself if it is there.

    One that is there by another name (of a mesh, of an axis) takes the plan's, or `jax.jit` would compile for each.
    """
    if isinstance(array, jax.Array) and array.sharding == sharding:
        return array
    placed: jax.Array = jax.device_put(array, sharding)
    return placed


def apart(leaves: Sequence[Any]) -> Sequence[Any]:
    """The leaves, with a copy of each array that comes again: a process that donates one buffer twice crashes.

    A target network that starts as the network itself is such a case.
    """
    if len({id(leaf) for leaf in leaves}) == len(leaves):
        return leaves
    seen: set[int] = set()
    found = []
    for leaf in leaves:
        found.append(leaf.copy() if isinstance(leaf, jax.Array) and id(leaf) in seen else leaf)
        seen.add(id(leaf))
    return found


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


@overload
def autoshard(
    step: Callable[..., Any],
    /,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    verify: str = NEVER,
    remat: str = AS_WRITTEN,
    plan: Plan | str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Sharded: ...
@overload
def autoshard(
    step: None = None,
    /,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    verify: str = NEVER,
    remat: str = AS_WRITTEN,
    plan: Plan | str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Callable[[Callable[..., Any]], Sharded]: ...
def autoshard(
    step: Callable[..., Any] | None = None,
    /,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Mapping[str, PartitionSpec] | None = None,
    verify: str = NEVER,
    remat: str = AS_WRITTEN,
    plan: Plan | str | os.PathLike[str] | None = None,
    cache: str | os.PathLike[str] | None = None,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    devices: Sequence[jax.Device] | None = None,
    progress: Progress | None = None,
) -> Sharded | Callable[[Callable[..., Any]], Sharded]:
    """Runs an ordinary single-device step on all devices, sharded by a plan that is searched at its first call.

    Args:
      step: a function as `jax.jit` takes it, or one that mutates NNX modules, as `nnx.jit` takes it.
      cluster: what the costs are of; by default the devices that JAX sees.
      memory: bytes that one device may hold (`"70GiB"` or a number); by default all that it has.
      strategy: `"auto"`, or a named strategy.
      mesh: axis names and sizes, to be used as they are; by default meshes are searched too.
      pins: path patterns of arguments, and the PartitionSpec that each shall have.
      verify: `"finalists"` compiles the best few plans before one is taken; see `ffjax.plan`.
      remat: `"search"` also decides what `jax.checkpoint` regions keep; see `ffjax.plan`.
      plan: a plan (or its file) to run instead of searching one.
      cache: a folder of plans: one found there for the same program and options is used again.
      static_argnums, donate_argnums: as in `jax.jit`.
      devices: those to run on; by default all.
      progress: called with what the search is doing and the share that is done.

    Returns:
      The sharded step, or a decorator if no step is given.

    >>> import jax.numpy as jnp
    >>> @autoshard
    ... def step(state, batch):
    ...     return state + (batch @ state).mean(), batch.sum()
    >>> state, total = step(jnp.zeros(4), jnp.ones((8, 4)))
    >>> float(total)
    32.0
    """
    if step is None:
        return functools.partial(
            autoshard,
            cluster=cluster,
            memory=memory,
            strategy=strategy,
            mesh=mesh,
            pins=pins,
            verify=verify,
            remat=remat,
            plan=plan,
            cache=cache,
            static_argnums=static_argnums,
            donate_argnums=donate_argnums,
            devices=devices,
            progress=progress,
        )
    if not callable(step):
        raise TraceError(f"autoshard was given {step!r}, which cannot be called. Remedy: give it the step's function.")
    check_remat(remat)
    if plan is not None:
        given = {"memory": memory, "mesh": mesh, "pins": pins, "strategy": None if strategy == AUTO else strategy}
        given["remat"] = None if remat == AS_WRITTEN else remat
        if idle := [name for name, value in given.items() if value is not None]:
            raise PlanError(
                f"autoshard was given plan= and {idle[0]}={given[idle[0]]!r}; a plan is run as it is. Remedy: drop "
                f"{idle[0]}=, or drop plan= and search with it."
            )
    options = Options(
        cluster=cluster,
        memory=memory,
        strategy=strategy,
        mesh=mesh,
        pins=pins,
        verify=verify,
        remat=remat,
        plan=plan if plan is None or isinstance(plan, Plan) else Plan.load(plan),
        cache=cache,
        static_argnums=static_argnums,
        donate_argnums=donate_argnums,
        devices=devices,
        progress=progress,
    )
    return Sharded(step, options)
