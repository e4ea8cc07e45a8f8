"""From a step and its arguments to a plan: trace, analyse, search, report."""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from ffjax import nnx
from ffjax.arguments import ArgumentOptions, Names, Numbers
from ffjax.by_hand import check_by_hand, mesh_by_hand
from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import parse_bytes
from ffjax.emit.emit import partition_spec
from ffjax.errors import BudgetError, FfjaxWarning, PinError, PlanError, PlanMismatch
from ffjax.finalists import settle
from ffjax.fingerprint import fingerprint
from ffjax.inputs import cluster_of, mesh_of, over_budget, warn_if_batch_is_whole
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import Spec, format_spec
from ffjax.ir.trace import Program
from ffjax.kept import as_planned, wanted_by, what_stays, with_kept
from ffjax.options import NEVER, SearchOptions
from ffjax.pins import Pins, Wanted, check_pins, keep_pins, pin_marks, pinned_specs
from ffjax.plan import Plan, RematVariant
from ffjax.plan_report import plan_of, subject
from ffjax.remat import alternatives, trace_call
from ffjax.strategies.candidates import is_candidate
from ffjax.strategies.families import family_keys, members
from ffjax.strategies.search import MOST_AXES, Progress, SearchResult, search
from ffjax.strategies.session import AUTO, Found


def plan(
    step: Callable[..., Any],
    *args: Any,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    strategy: str = AUTO,
    mesh: Mapping[str, int] | None = None,
    pins: Pins | None = None,
    verify: str = NEVER,
    remat: str = AS_WRITTEN,
    keep_shardings: bool = True,
    static_argnums: Numbers = None,
    static_argnames: Names = None,
    donate_argnums: Numbers = None,
    donate_argnames: Names = None,
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
      remat: `"search"` also decides what the step's `jax.checkpoint` regions keep for the backward pass: each policy
        is searched (`"off"`, `"dots_saveable"`, `"dots_with_no_batch_dims_saveable"`, `"nothing_saveable"`) and the
        fastest plan that fits wins; one of these names fixes it. `"as written"` leaves it to the step: another policy
        is another program, with other memory and rounding than the one that was asked for, and takes a search more.
      keep_shardings: whether arguments that are sharded already, and sharding constraints in the step, stay as they are
        (with `strategy="auto"`, on their mesh); False plans all anew. See `ffjax.kept`.
      static_argnums, static_argnames, donate_argnums, donate_argnames: as in `jax.jit`.
      progress: called with what is being done and the share that is done.

    Raises:
      TraceError, ClusterError, PinError, BudgetError, PlanError: each names the input and the remedy.

    >>> import jax, jax.numpy as jnp
    >>> w, x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32), jax.ShapeDtypeStruct((65536, 4096), jnp.float32)
    >>> found = plan(lambda w, x: w - x.T @ (x @ w), w, x, cluster=Cluster.named("h100", hosts=2), strategy="fsdp")
    >>> found.devices, sorted(c.kind for c in found.estimate.collectives)
    (16, ['all_gather', 'reduce_scatter'])
    """
    began = time.perf_counter()
    options = SearchOptions(
        cluster=cluster,
        memory=memory,
        strategy=strategy,
        mesh=mesh,
        pins=pins,
        verify=verify,
        remat=remat,
        keep_shardings=keep_shardings,
        progress=progress,
    )
    options.check()
    marks = ArgumentOptions(
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
        donate_argnames=donate_argnames,
    )
    call = call_of(step, args, kwargs, marks)
    program = trace_call(call, remat)
    others = alternatives(call, program, remat)
    return plan_program(program, options, others=others, trace_s=time.perf_counter() - began)


def trace_step(
    step: Callable[..., Any],
    args: Sequence[Any],
    kwargs: dict[str, Any],
    *,
    static_argnums: Numbers = None,
    static_argnames: Names = None,
    donate_argnums: Numbers = None,
    donate_argnames: Names = None,
    remat: str = AS_WRITTEN,
) -> Program:
    """Traces a step; one that takes NNX objects is made a function of their state first."""
    marks = ArgumentOptions(
        static_argnums=static_argnums,
        static_argnames=static_argnames,
        donate_argnums=donate_argnums,
        donate_argnames=donate_argnames,
    )
    return trace_call(call_of(step, args, kwargs, marks), remat)


def call_of(step: Callable[..., Any], args: Sequence[Any], kwargs: dict[str, Any], marks: ArgumentOptions) -> nnx.Call:
    """A step and its arguments as a function of arrays; of a step under `autoshard` what is under it."""
    from ffjax.sharded import Sharded

    if isinstance(step, Sharded):
        step = step.__wrapped__  # type: ignore[attr-defined]  # of functools.update_wrapper
    return nnx.as_function(step, args, kwargs, *marks.of(step))


@contextlib.contextmanager
def _without_collector() -> Iterator[None]:
    """Without the collector of reference cycles, which walks all objects again and again as they become more.

    Analyses make millions, all of which live to the end of the search, and hardly a cycle: it was a quarter of the
    seconds of a long program.
    """
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


@_without_collector()
def plan_program(
    program: Program,
    options: SearchOptions | None = None,
    *,
    others: Sequence[Program] = (),
    trace_s: float = 0.0,
) -> Plan:
    """Searches a plan for a program that is traced already; see `plan`.

    `others` are the same step under other policies of its `jax.checkpoint` regions: the fastest of all wins.
    """
    options = options or SearchOptions()
    options.check()
    programs = (program, *others)
    variants: dict[object, _Variant] = {}
    for index, each in enumerate(programs):
        own = dataclasses.replace(options, progress=_part(options.progress, index, programs))
        with warnings.catch_warnings():
            if index:
                warnings.simplefilter("ignore", FfjaxWarning)  # what there is to say was said of the first
            asked = ProgramSearch(each, own, trace_s=0.0 if index else trace_s)
        key = fingerprint(asked.regions) if others else None
        if key not in variants:
            variants[key] = _Variant(asked, asked.search(asked.budget_bytes))
    ranked = sorted(variants.values(), key=_Variant.rank)
    best = ranked[0]
    if not best.result.best.fits:
        retrace = program.checkpoints and not others
        raise over_budget(best.result, best.asked.budget_bytes, best.asked.cluster, retrace=retrace)
    warn_if_batch_is_whole(best.asked.regions, best.result)
    seconds: dict[str, float] = {}
    for variant in ranked:
        for phase, spent in variant.asked.seconds.items():
            seconds[phase] = seconds.get(phase, 0.0) + spent
    for variant in ranked:
        variant.asked.seconds = seconds
    rows = _rows(ranked) if len(ranked) > 1 else ()
    if options.verify == NEVER:
        return _with_rows(best.asked.plan(best.result, best.result.best), rows)
    return _with_rows(_fastest_compiled([v.settled for v in ranked if v.result.best.fits]), rows)


class ProgramSearch:
    """What is asked of one program, checked; see `plan`. Searches share its analysis."""

    def __init__(self, program: Program, options: SearchOptions | None = None, *, trace_s: float = 0.0) -> None:
        began = time.perf_counter()
        options = options or SearchOptions()
        self.program, self.strategy, self.pins, self.progress = (
            program,
            options.strategy,
            options.pins or {},
            options.progress,
        )
        self.cluster = cluster_of(options.cluster)
        memory = options.memory
        self.budget_bytes = float(self.cluster.device.memory_bytes if memory is None else parse_bytes(memory))
        self.meshes = None if options.mesh is None else [mesh_of(options.mesh, self.cluster)]
        kept = what_stays(program, options, self.cluster.devices)
        self.program = with_kept(program, kept, say=options.keep_shardings)
        self.kept: Mapping[str, Spec] = kept.args
        if kept.mesh is not None and (kept.args or self.program.constraints):
            self.meshes = [kept.mesh]
        if self.meshes is None and (by_hand := mesh_by_hand(self.program, self.cluster.devices)) is not None:
            self.meshes = [by_hand]
        check_by_hand(self.program, self.meshes[0] if self.meshes else None, self.cluster.devices)
        self.regions = find_regions(build_graph(self.program))
        pinned = pinned_specs(self.regions, self.pins)
        check_pins(self.regions, pinned, self.meshes or self.cluster.mesh_shapes(max_axes=MOST_AXES))
        self.wanted: Wanted = pinned
        if kept.mesh is not None:
            self.wanted, left = wanted_by(self.regions, self.kept, kept.mesh, pinned)
            if left:
                more = f" and {len(left) - 4} more" if len(left) > 4 else ""
                warnings.warn(
                    f"{program.name} comes with shardings that cannot be kept: {', '.join(left[:4])}{more}. The plan "
                    "decides. Remedy: shard alike what is computed together, in dimensions that divide; "
                    "keep_shardings=False plans all anew.",
                    FfjaxWarning,
                    stacklevel=5,
                )
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
                keep=keep_pins(self.regions, self.wanted),
                marks=pin_marks(self.regions, self.wanted),
                progress=self.progress,
            )
        except ValueError as error:
            raise (PinError if self.wanted else PlanError)(f"{self.program.name}: {error}") from error
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
            kept=self.kept,
            marked=bool(self.wanted),
        )


@dataclass(frozen=True, slots=True)
class _Variant:
    """A program under one policy, and what its search found."""

    asked: ProgramSearch
    result: SearchResult

    def rank(self) -> tuple[bool, float]:
        """Those that fit first, by their seconds; then by how little is missing."""
        best = self.result.best
        return (not best.fits, best.predicted_s if best.fits else best.peak.bytes)

    def settled(self) -> Plan:
        """The best by compiling."""
        asked = self.asked
        return settle(
            self.result, asked.cluster, asked.budget_bytes, asked.search, asked.plan, asked.seconds, asked.progress
        )


def _with_rows(plan: Plan, rows: tuple[RematVariant, ...]) -> Plan:
    return dataclasses.replace(plan, search=dataclasses.replace(plan.search, remat=rows))


def _part(progress: Progress | None, index: int, programs: Sequence[Program]) -> Progress | None:
    """What is told of the search of one of several programs, as a part of them all."""
    if progress is None or len(programs) == 1:
        return progress
    return lambda what, share: progress(f"{what}, remat {programs[index].remat}", (index + share) / len(programs))


def _rows(variants: Iterable[_Variant]) -> tuple[RematVariant, ...]:
    return tuple(
        RematVariant(
            policy=v.asked.program.remat,
            strategy=v.result.best.strategy,
            mesh=str(v.result.best.mesh),
            step_s=v.result.best.predicted_s,
            peak_bytes=v.result.best.peak.bytes,
            fits=v.result.best.fits,
        )
        for v in sorted(variants, key=_Variant.rank)
    )


def _fastest_compiled(settled: Sequence[Callable[[], Plan]]) -> Plan:
    """The plan whose compiled program is fastest; raises the first BudgetError where none fits once compiled."""
    plans: list[Plan] = []
    errors: list[BudgetError] = []
    for settle_one in settled:
        try:
            plans.append(settle_one())
        except BudgetError as error:
            errors.append(error)
    if not plans:
        raise errors[0]
    return min(plans, key=lambda p: p.search.finalists[0].compiled_step_s)


def bind_program(plan: Plan, program: Program) -> Plan:
    """A plan on a program; raises PlanMismatch that says what differs if it was made for another."""
    for ours, theirs in zip(program.args, plan.args, strict=False):
        if (ours.path, ours.shape, ours.dtype) != (theirs.path, theirs.shape, theirs.dtype):
            raise PlanMismatch(
                f"the plan of {plan.program!r} was made for {theirs.path}: {theirs.dtype}{list(theirs.shape)}, but the "
                f"argument is {ours.path}: {ours.dtype}{list(ours.shape)}. Remedy: search a plan for these arguments."
            )
    if program.remat != plan.remat:
        raise PlanMismatch(
            f"the plan of {plan.program!r} was made with remat={plan.remat!r}, but the program was traced with "
            f"remat={program.remat!r}. Remedy: plan.bind(step, *args), which traces it as the plan wants."
        )
    program = as_planned(program, plan)
    regions = find_regions(build_graph(program))
    plan.check_fingerprint(fingerprint(regions), program.name)
    wanted: Wanted = pinned_specs(regions, {pattern: partition_spec(spec) for pattern, spec in plan.pins.items()})
    if plan.kept or program.constraints:
        wanted, _ = wanted_by(regions, plan.kept, plan.mesh, wanted)
    keys = family_keys(regions, pin_marks(regions, wanted))
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
