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
    began = time.perf_counter()
    cluster = cluster_of(cluster)
    if verify not in (NEVER, FINALISTS):
        raise PlanError(
            f"verify={verify!r} is no way to verify. Remedy: {NEVER!r}, or {FINALISTS!r} to compile the best."
        )
    budget = float(cluster.device.memory_bytes if memory is None else parse_bytes(memory))
    meshes = None if mesh is None else [mesh_of(mesh, cluster)]
    graph = build_graph(program)
    regions = find_regions(graph)
    if pins:
        check_pins(regions, pins, meshes or cluster.mesh_shapes(max_axes=MOST_AXES))
    seconds = {"trace": trace_s, "rules": time.perf_counter() - began}

    def searched(budget_bytes: float) -> SearchResult:
        try:
            result = search(
                regions,
                cluster,
                budget_bytes=budget_bytes,
                strategy=strategy,
                meshes=meshes,
                keep=keep_pins(regions, pins or {}),
                marks=pin_marks(regions, pins or {}),
                progress=progress,
            )
        except ValueError as error:
            raise (PinError if pins else PlanError)(f"{program.name}: {error}") from error
        for phase, spent in result.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
        return result

    def reported(result: SearchResult, found: Found) -> Plan:
        return plan_of(program, regions, cluster, result, found, budget, strategy, pins or {}, seconds)

    result = searched(budget)
    if not result.best.fits:
        raise over_budget(result, budget, cluster)
    warn_if_batch_is_whole(regions, result)
    if verify == NEVER:
        return reported(result, result.best)
    return settle(result, cluster, budget, searched, reported, seconds, progress)


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
