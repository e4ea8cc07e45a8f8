"""A step under `autoshard`: finds its plan at the first call of each signature, then runs it like a jitted function."""

from __future__ import annotations

import dataclasses
import functools
import types
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import jax
import numpy as np
from jax.sharding import NamedSharding

from ffjax import nnx
from ffjax.cost.cluster import Cluster, by_host
from ffjax.distributed.agreement import agreed_plan
from ffjax.emit.emit import in_shardings
from ffjax.emit.run import jitted
from ffjax.errors import ClusterError, PlanError
from ffjax.ir.compat import no_mesh
from ffjax.ir.trace import Program, argument_names, function_name
from ffjax.placing import apart, place
from ffjax.plan import Plan
from ffjax.plan_cache import CachedPlan
from ffjax.planning.fingerprint import program_fingerprint
from ffjax.planning.inputs import cluster_of
from ffjax.planning.kept import as_planned, devices_of
from ffjax.planning.planner import plan_program
from ffjax.planning.remat import alternatives, trace_call, under
from ffjax.planning.tracing import Stepped
from ffjax.state import Places, batch_arguments, prefetched
from ffjax.step_options import StepOptions

_T = TypeVar("_T")


@dataclass(slots=True, kw_only=True)
class _Entry:
    """One signature of arguments: its plan, bound to its program, and, once it has run, what runs it."""

    plan: Plan
    program: Program
    places: Places | None = None
    runner: _Runner | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class _Runner:
    """The jitted step, where its arguments go, and the arrays that the step closes over, in place."""

    run: jax.stages.Wrapped
    shardings: Sequence[NamedSharding]
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


class Sharded(Stepped):
    """A step under `autoshard`. Call it like the step; `plan`, `lower`, `init` and `place_*` say and do the rest."""

    def __init__(self, step: Callable[..., Any], options: StepOptions) -> None:
        self._step = step
        self._options = options
        self._static, self._donated = options.arguments.of(step)
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
            with no_mesh():
                out = known.runner.run(*known.runner.closures, *known.runner.place(leaves))
            return jax.tree.unflatten(known.program.out_tree, out)
        call = self._call(args, kwargs)
        if call.step is self._step and not call.static:
            self._plain.add(tree)
        self._check_devices()
        entry = self._entry(call)
        with no_mesh():
            runner = self._runner(entry)
            out = runner.run(*runner.closures, *runner.place(jax.tree.leaves(call.traced)))
        return call.finish(jax.tree.unflatten(entry.program.out_tree, out))

    def plan(self, *args: Any, **kwargs: Any) -> Plan:
        """The plan for these arguments, which may be arrays or `jax.ShapeDtypeStruct`."""
        return self._entry(self._call(args, kwargs)).plan

    def lower(self, *args: Any, **kwargs: Any) -> jax.stages.Lowered:
        """The sharded step, lowered for the devices that it would run on."""
        return self.plan(*args, **kwargs).lower(self._devices())

    def init(self, init_fn: Callable[..., Any], *args: Any, argument: str | None = None) -> Any:
        """Builds a state already sharded, as the plan wants the argument that it is for: no device holds it whole.

        Plan first (`step.plan(jax.eval_shape(init_fn, *args), batch)`): the state goes where that plan has an argument
        with the same leaves, or, with `argument`, to the one of that path. With several processes each calls it alike.

        Raises:
          PlanError: before there is a plan, or where the state fits none of the step's arguments.
        """
        call = nnx.as_builder(init_fn)
        made = jax.eval_shape(call.build, *args)
        shardings = self._with_plan("init", lambda places, _: places.of(call.arrays(made), argument))
        placed = jax.tree.unflatten(jax.tree.structure(made), shardings)
        with no_mesh():
            return call.finish(jax.jit(call.build, out_shardings=placed)(*args))

    def place_state(self, state: Any, argument: str | None = None, *, donate: bool = False) -> Any:
        """A state where the plan wants it, from wherever it is: the host, one device, another plan or mesh.

        Pieces go from device to device: no device and no host has a whole array on the way. In a program of several
        processes a state on the host must be the same, and whole, in each; one on other devices goes by a checkpoint.

        Args:
          state: an argument of the step, a part of one (`state.params`), or a tuple of these; NNX objects are updated.
          argument: the path of what it is for, where it would fit several; by default the first.
          donate: gives each array up as soon as it is moved, so that both states never exist at once.

        Raises:
          PlanError: before there is a plan (call `step.plan(state, batch)`, of shapes too, first), or where the state
            fits none of the step's arguments.
        """
        return self._with_plan("place_state", lambda places, _: places.place_state(state, argument, donate=donate))

    def abstract_state(self, state: Any, argument: str | None = None) -> Any:
        """Shapes, dtypes and shardings of a state under the plan: what Orbax takes as the target of a restore.

        Args:
          state: arrays or `jax.ShapeDtypeStruct`; of NNX objects come the nested dictionaries of their arrays.
          argument: see `place_state`.

        Returns:
          The state with a `jax.ShapeDtypeStruct` that has a sharding for each array.
        """
        return self._with_plan("abstract_state", lambda places, _: places.abstract_state(state, argument))

    def place_batch(self, batch: Any, arguments: str | Sequence[str] | None = None) -> Any:
        """A batch of the host's on the devices, as the plan wants it.

        Where the step takes several arguments besides its state, the batch is a tuple of them, in their order. In a
        program of several processes each passes the whole batch, or just the rows that its own devices hold: which it
        is shows in the shapes.

        Args:
          batch: a pytree of NumPy arrays.
          arguments: names of the arguments that it is; by default all of which the step returns no successor.

        Raises:
          PlanError: before there is a plan, or where the batch is not what the plan is for.
        """

        def placed(places: Places, program: Program) -> Any:
            names = batch_arguments(program) if arguments is None else arguments
            return places.place_batch(batch, (names,) if isinstance(names, str) else names)

        return self._with_plan("place_batch", placed)

    def place_batches(
        self, batches: Iterable[Any], ahead: int = 2, arguments: str | Sequence[str] | None = None
    ) -> Iterator[Any]:
        """`place_batch` of each of some batches, of which `ahead` are on their way to the devices at any time."""
        if ahead < 1:
            raise PlanError(f"place_batches(ahead={ahead}). Remedy: 1 or more; 2 hides the transfers behind the steps.")
        return prefetched((self.place_batch(batch, arguments) for batch in batches), ahead)

    def _with_plan(self, what: str, use: Callable[[Places, Program], _T]) -> _T:
        """What is done by the plan of the last signature; where it does not fit, by that of an earlier one."""
        name = function_name(self._step)
        first: PlanError | None = None
        for entry in reversed(self._entries.values()):
            try:
                with no_mesh():
                    return use(self._places(entry), entry.program)
            except PlanError as error:
                first = first or error
        given = ", ".join(argument_names(self._step, 2)) or "*args"
        raise first or PlanError(
            f"{name}.{what} has no plan yet, which says where arrays go. Remedy: call {name}.plan({given}) first, with "
            "arrays or shapes (of a state that is not there yet: jax.eval_shape(init, *args)), or run a step."
        )

    def _call(self, args: Sequence[Any], kwargs: dict[str, Any]) -> nnx.Call:
        return nnx.as_function(self._step, args, kwargs, self._static, self._donated)

    def _devices(self) -> Sequence[jax.Device]:
        return by_host(jax.devices()) if self._options.devices is None else self._options.devices

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
        leaves, tree = jax.tree.flatten(call.traced)
        for which, value in call.static.items():
            try:
                hash(value)
            except TypeError as error:
                raise PlanError(
                    f"argument {which} of {function_name(self._step)} is static, but {type(value).__name__} cannot be "
                    "hashed. Remedy: let it be traced, or pass something that can be (a tuple, a frozen dataclass)."
                ) from error
        # 1, 1.0 and True are equal, but not to what a step computes of them.
        signature = (tree, _kinds(leaves), tuple((which, type(value), value) for which, value in call.static.items()))
        if signature not in self._entries:
            given, remat = self._options.plan, self._options.search.remat
            program = trace_call(call, remat if given is None else given.remat)
            if given is None:
                found = self._known(call, program)
            else:
                found = self._agreed(call, program, search=functools.partial(given.bind_program, program))
            self._entries[signature] = _Entry(plan=found, program=found.bound.graph.program)
        return self._entries[signature]

    def _known(self, call: nnx.Call, program: Program) -> Plan:
        """The plan of another signature that traces to the same program (weak types, structure), or one of its own."""
        policies = dict.fromkeys(entry.plan.remat for entry in self._entries.values())
        for same in (under(call, program, policy) for policy in policies):
            for entry in self._entries.values():
                wanted = program_fingerprint(as_planned(same, entry.plan))
                if (entry.plan.remat, entry.plan.fingerprint) == (same.remat, wanted):
                    return entry.plan.bind_program(same)
        return self._cached(call, program)

    def _agreed(
        self, call: nnx.Call, program: Program, search: Callable[[], Plan], cached: CachedPlan | None = None
    ) -> Plan:
        """The plan that all processes of a run use: one of them finds it, the others take what it found."""
        return agreed_plan(
            program,
            self._options.facts(),
            search=search,
            bind=lambda plan: plan.bind_program(under(call, program, plan.remat)),
            cached=cached,
        )

    def _runner(self, entry: _Entry) -> _Runner:
        if entry.runner is None:
            layout, places = entry.plan.bound, self._places(entry)
            closures = zip(entry.program.closures, in_shardings(layout, places.mesh), strict=False)
            entry.runner = _Runner(
                run=jitted(layout, places.mesh),
                shardings=places.shardings,
                closures=tuple(place(x, s) for x, s in closures),
                accepted=[None] * len(places.shardings),
                donates=any(layout.graph.program.donated),
            )
        return entry.runner

    def _places(self, entry: _Entry) -> Places:
        if entry.places is None:
            own = devices_of(entry.program, entry.plan.mesh) if self._options.devices is None else None
            entry.places = Places(entry.plan, own or self._devices())
        return entry.places

    def _cached(self, call: nnx.Call, program: Program) -> Plan:
        """The plan from the cache folder, or a new one, which is then put there."""
        options = self._options.search
        cluster = Cluster.local(self._options.devices) if options.cluster is None else cluster_of(options.cluster)

        def searched() -> Plan:
            asked = dataclasses.replace(options, cluster=cluster)
            return plan_program(program, asked, others=alternatives(call, program, options.remat))

        folder = self._options.cache
        cached = None if folder is None else CachedPlan.at(folder, program, options, cluster)
        return self._agreed(call, program, searched, cached)


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
