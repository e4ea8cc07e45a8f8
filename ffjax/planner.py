"""From a step and its arguments to a plan: trace, analyse, search, report."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from jax.sharding import PartitionSpec

from ffjax import nnx
from ffjax.cost.cluster import Cluster, parse_bytes
from ffjax.emit.emit import partition_spec
from ffjax.errors import PinError, PlanError, PlanMismatch
from ffjax.finalists import settle
from ffjax.fingerprint import fingerprint
from ffjax.inputs import argnums, cluster_of, mesh_of, over_budget, warn_if_batch_is_whole
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import Spec, format_spec
from ffjax.ir.trace import Program, trace
from ffjax.pins import check_pins, keep_pins, pin_marks
from ffjax.plan import Plan
from ffjax.plan_report import plan_of, subject
from ffjax.strategies.candidates import is_candidate
from ffjax.strategies.families import family_keys, members
from ffjax.strategies.search import AUTO, MOST_AXES, Found, Progress, SearchResult, search

Pins = Mapping[str, PartitionSpec]
NEVER, FINALISTS = "never", "finalists"


def plan(
    step: Callable[..., Any],
    *args: Any,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    verify: str = NEVER,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
    progress: Progress | None = None,
    **kwargs: Any,
) -> Plan:
    """Searches a plan for one step. Needs no devices: arguments may be `jax.ShapeDtypeStruct`.

    Args:
      step: a function as `jax.jit` takes it, or one that mutates NNX modules, as `nnx.jit` takes it.
      args, kwargs: its arguments, arrays or shapes.
      cluster: where it shall run; by default the devices that JAX sees.
      memory: bytes that one device may hold (`"70GiB"` or a number); by default all that it has.
      strategy: `"auto"`, or a named strategy.
      mesh: axis names and sizes, to be used as they are; by default meshes are searched too.
      pins: path patterns of arguments, and the PartitionSpec that each shall have.
      verify: `"finalists"` compiles the best few plans, for the cluster's devices or compile-only ones, drops those
        that do not fit and takes the one whose compiled program is fastest; `"never"` compiles nothing.
      static_argnums, donate_argnums: as in `jax.jit`.
      progress: called with what is being done and the share that is done.

    Raises:
      TraceError, ClusterError, PinError, BudgetError, PlanError: each names the input and the remedy.
    """
    began = time.perf_counter()
    program = trace_step(step, args, kwargs, static_argnums=static_argnums, donate_argnums=donate_argnums)
    return plan_program(
        program,
        cluster=cluster,
        memory=memory,
        strategy=strategy,
        mesh=mesh,
        pins=pins,
        verify=verify,
        progress=progress,
        trace_s=time.perf_counter() - began,
    )


def trace_step(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    static_argnums: int | Sequence[int] = (),
    donate_argnums: int | Sequence[int] = (),
) -> Program:
    """Traces a step; one that takes NNX objects is made a function of their state first."""
    static = argnums(static_argnums, len(args), "static_argnums")
    donated = argnums(donate_argnums, len(args), "donate_argnums")
    return trace_call(nnx.as_function(step, args, kwargs, static, donated))


def trace_call(call: nnx.Call) -> Program:
    """Traces a call that is a function of arrays already."""
    return trace(
        call.step, call.args, call.kwargs, static_argnums=call.static_argnums, donate_argnums=call.donate_argnums
    )


def plan_program(
    program: Program,
    *,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    verify: str = NEVER,
    progress: Progress | None = None,
    trace_s: float = 0.0,
) -> Plan:
    """Searches a plan for a program that is traced already; see `plan`."""
    if verify not in (NEVER, FINALISTS):
        raise PlanError(
            f"verify={verify!r} is no way to verify. Remedy: {NEVER!r}, or {FINALISTS!r} to compile the best."
        )
    asked = ProgramSearch(
        program,
        cluster=cluster,
        memory=memory,
        strategy=strategy,
        mesh=mesh,
        pins=pins,
        progress=progress,
        trace_s=trace_s,
    )
    result = asked.search(asked.budget_bytes)
    if not result.best.fits:
        raise over_budget(result, asked.budget_bytes, asked.cluster)
    warn_if_batch_is_whole(asked.regions, result)
    if verify == NEVER:
        return asked.plan(result, result.best)
    return settle(result, asked.cluster, asked.budget_bytes, asked.search, asked.plan, asked.seconds, progress)


class ProgramSearch:
    """What is asked of one program, checked; see `plan`. Searches share its analysis."""

    def __init__(
        self,
        program: Program,
        *,
        cluster: Cluster | None = None,
        memory: str | float | None = None,
        strategy: str = AUTO,
        mesh: Mapping[str, int] | None = None,
        pins: Pins | None = None,
        progress: Progress | None = None,
        trace_s: float = 0.0,
    ) -> None:
        began = time.perf_counter()
        self.program, self.strategy, self.pins, self.progress = program, strategy, pins or {}, progress
        self.cluster = cluster_of(cluster)
        self.budget_bytes = float(self.cluster.device.memory_bytes if memory is None else parse_bytes(memory))
        self.meshes = None if mesh is None else [mesh_of(mesh, self.cluster)]
        self.regions = find_regions(build_graph(program))
        if self.pins:
            check_pins(self.regions, self.pins, self.meshes or self.cluster.mesh_shapes(max_axes=MOST_AXES))
        self.seconds = {"trace": trace_s, "rules": time.perf_counter() - began}
        """Where the time went, all searches together."""

    def search(self, budget_bytes: float) -> SearchResult:
        """Searches within a budget; raises PlanError or PinError where there is nothing to search."""
        try:
            result = search(
                self.regions,
                self.cluster,
                budget_bytes=budget_bytes,
                strategy=self.strategy,
                meshes=self.meshes,
                keep=keep_pins(self.regions, self.pins),
                marks=pin_marks(self.regions, self.pins),
                progress=self.progress,
            )
        except ValueError as error:
            raise (PinError if self.pins else PlanError)(f"{self.program.name}: {error}") from error
        for phase, spent in result.seconds.items():
            self.seconds[phase] = self.seconds.get(phase, 0.0) + spent
        return result

    def plan(self, result: SearchResult, found: Found) -> Plan:
        """One of a search's findings as a plan."""
        return plan_of(
            self.program,
            self.regions,
            self.cluster,
            result,
            found,
            self.budget_bytes,
            self.strategy,
            self.pins,
            self.seconds,
        )


def bind_program(plan: Plan, program: Program) -> Plan:
    """A plan on a program; raises PlanMismatch that says what differs if it was made for another."""
    for ours, theirs in zip(program.args, plan.args, strict=False):
        if (ours.path, ours.shape, ours.dtype) != (theirs.path, theirs.shape, theirs.dtype):
            raise PlanMismatch(
                f"the plan of {plan.program!r} was made for {theirs.path}: {theirs.dtype}{list(theirs.shape)}, but the "
                f"argument is {ours.path}: {ours.dtype}{list(ours.shape)}. Remedy: search a plan for these arguments."
            )
    regions = find_regions(build_graph(program))
    plan.check_fingerprint(fingerprint(regions), program.name)
    marks = pin_marks(regions, {pattern: partition_spec(spec) for pattern, spec in plan.pins.items()})
    keys = family_keys(regions, marks)
    found = {d.key: d.assignment(plan.mesh) for d in plan.decisions}
    nothing = Assignment((UNUSED,) * len(plan.mesh.axes), (UNUSED,) * len(plan.mesh.axes))
    for key, family in members(keys).items():
        first = regions.regions[family[0]]
        chosen = found.setdefault(key, nothing) if not first.sizes else found.get(key)
        if chosen is None or not is_candidate(regions, first, chosen, plan.mesh):
            where, what = subject(regions.graph, first)
            fault = "no" if chosen is None else "an impossible"
            raise PlanError(
                f"the plan of {plan.program!r} has {fault} decision for {what} at {where} (key {key!r}). Remedy: "
                "restore the plan's file, or search the plan again; pins= changes a plan."
            )
    layout = Layout(regions=regions, mesh=plan.mesh, assignments=[found[k] for k in keys], axis_prices=plan.axis_prices)
    for placement, spec in zip(plan.args, _argument_specs(layout), strict=True):
        if placement.spec != spec:
            raise PlanError(
                f"the plan of {plan.program!r} says that {placement.path} is {format_spec(placement.spec)}, but by its "
                f"decisions it is {format_spec(spec)}. Remedy: restore the plan's file; pins= changes a plan."
            )
    return dataclasses.replace(plan, layout=layout)


def _argument_specs(layout: Layout) -> list[Spec]:
    """How the leaves of the arguments are sharded."""
    graph = layout.graph
    return [layout.home(graph.ops[op].results[0]) for op in graph.arguments[len(graph.program.closures) :]]
