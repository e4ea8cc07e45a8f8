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

from ffjax.arguments import ArgumentOptions, Names, Numbers
from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import parse_bytes
from ffjax.errors import BudgetError, FfjaxWarning, PinError, PlanError
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.graph import build_graph
from ffjax.ir.regions import find_regions
from ffjax.ir.spec import Spec
from ffjax.ir.trace import Program
from ffjax.plan import Plan
from ffjax.plan_record import RematVariant
from ffjax.planning.by_hand import check_by_hand, mesh_by_hand
from ffjax.planning.finalists import settle
from ffjax.planning.fingerprint import fingerprint
from ffjax.planning.inputs import cluster_of, mesh_of, over_budget, warn_if_batch_is_whole
from ffjax.planning.kept import wanted_by, what_stays, with_kept
from ffjax.planning.options import NEVER, SearchOptions
from ffjax.planning.pins import Pins, Wanted, check_pins, keep_pins, pin_marks, pinned_specs
from ffjax.planning.remat import alternatives, trace_call
from ffjax.planning.report import plan_of
from ffjax.planning.tracing import call_of
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
        (with `strategy="auto"`, on their mesh); False plans all anew. See `ffjax.planning.kept`.
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
