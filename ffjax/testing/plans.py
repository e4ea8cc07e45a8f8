"""What a program communicates and whether it fits, as assertions on plans, lowered and compiled programs."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax

from ffjax.cost.cluster import Cluster
from ffjax.cost.hardware import parse_bytes
from ffjax.cost.hlo.collectives import collectives_of
from ffjax.errors import BudgetError, FfjaxError
from ffjax.ir.spec import COLLECTIVE_KINDS, CollectiveKind, summarize
from ffjax.plan import Plan
from ffjax.planning.planner import plan
from ffjax.sharded import Sharded
from ffjax.units import amount, bytes_text

_MAX_SHOWN = 6  # arrays alive at a peak


def assert_collectives(
    program: Plan | jax.stages.Lowered | jax.stages.Compiled,
    expected: Mapping[CollectiveKind, float] | Iterable[CollectiveKind],
    *,
    rtol: float = 0.1,
) -> None:
    """Checks which kinds of collectives one run of a program has, and how many bytes each moves.

    Args:
        program: a plan, of which nothing is compiled, or a lowered or compiled program; a lowered one is compiled
            first. XLA:CPU makes no reduce-scatters: where a plan has one, a program compiled for fake devices has an
            all-reduce.
        expected: bytes by kind, as one device holds them of the larger side (`ffjax.ir.spec.Collective`); or kinds
            alone, whatever they move. A kind that is not named must not occur.
        rtol: relative tolerance of each kind's bytes.

    Raises:
        AssertionError: shows both, and the measured mapping ready to paste.
        FfjaxError: for a kind that there is not.

    >>> import ffjax, jax.numpy as jnp
    >>> w, x = jax.ShapeDtypeStruct((64, 8), jnp.float32), jax.ShapeDtypeStruct((1024, 64), jnp.float32)
    >>> plan = ffjax.plan(lambda w, x: w - x.T @ (x @ w), w, x, mesh={"x": 8}, strategy="data_parallel")
    >>> assert_collectives(plan, {"all_reduce": 64 * 8 * 4})
    >>> assert_collectives(plan, ["all_reduce"])
    """
    wanted = dict(expected) if isinstance(expected, Mapping) else dict.fromkeys(expected)
    if unknown := wanted.keys() - set(COLLECTIVE_KINDS):
        raise FfjaxError(f"no such collective: {sorted(unknown)}; the kinds are {', '.join(COLLECTIVE_KINDS)}")
    actual = _collective_bytes(program)
    problems = [p for kind in COLLECTIVE_KINDS if (p := _problem(kind, actual.get(kind), wanted, rtol))]
    if problems:
        raise AssertionError("\n  ".join(["the program's collectives differ", *problems, f"it has: {actual}"]))


def _problem(
    kind: CollectiveKind, actual: float | None, wanted: Mapping[CollectiveKind, float | None], rtol: float
) -> str | None:
    """What is wrong with the bytes of one kind; None for `actual` stands for no such collective."""
    if kind in wanted and wanted[kind] is None:
        return f"{kind}: none, expected some" if actual is None else None
    found, bytes_ = actual or 0.0, wanted.get(kind) or 0.0
    if abs(found - bytes_) <= rtol * bytes_:
        return None
    return f"{kind}: {found:,.0f} bytes, expected {bytes_:,.0f} within {rtol:.0%}"


def _collective_bytes(program: Plan | jax.stages.Lowered | jax.stages.Compiled) -> dict[CollectiveKind, float]:
    if isinstance(program, Plan):
        totals: dict[CollectiveKind, float] = {}
        for c in program.estimate.collectives:
            totals[c.kind] = totals.get(c.kind, 0.0) + c.bytes
        return totals
    compiled = program.compile() if isinstance(program, jax.stages.Lowered) else program
    return {kind: total_bytes for kind, (_, total_bytes) in summarize(collectives_of(compiled)).items()}


def assert_fits(
    plan_or_step: Plan | Sharded | Callable[..., Any],
    *args: Any,
    cluster: Cluster | None = None,
    memory: str | float | None = None,
    compiled: bool = False,
    **options: Any,
) -> Plan:
    """Checks that a step fits into the memory of each device, and gives the plan that says so.

    Args:
        plan_or_step: a plan; or a step, with its arguments (arrays or shapes), of which the fastest plan that fits is
            searched. A step under `ffjax.autoshard` is planned as it would be when called.
        args: the step's arguments.
        cluster: where it shall run; by default the plan's cluster, or the devices that are here.
        memory: bytes that one device may hold (`"70GiB"` or a number); by default all that it has.
        compiled: also compiles the plan, for devices that are here or compile-only ones (`Plan.verify`), and checks
            what the compiler says that it needs.
        options: what else `ffjax.plan` takes (`strategy=`, `donate_argnums=`, `pins=`, ...) and the step's keyword
            arguments.

    Raises:
        AssertionError: says what it needs, of what, and which arrays are the largest at its peak.
        FfjaxError: where there is nothing to check: arguments for a plan, a cluster for a step that has its own.

    >>> import ffjax, jax.numpy as jnp
    >>> h100s = ffjax.Cluster.named("h100", hosts=1)
    >>> x = jax.ShapeDtypeStruct((4096, 4096), jnp.float32)
    >>> found = assert_fits(lambda x: x @ x, x, cluster=h100s, memory="100MiB")
    >>> found.mesh.devices
    8
    """
    found = _planned(plan_or_step, args, cluster, memory, options)
    budget = found.budget_bytes if cluster is None else float(cluster.device.memory_bytes)
    budget = budget if memory is None else float(parse_bytes(memory))
    largest = [f"  {bytes_text(size):>10}  {what}" for what, size in found.estimate.largest[:_MAX_SHOWN]]
    _check(found, found.estimate.peak_bytes, budget, "needs", ["At its peak the largest arrays alive are:", *largest])
    if compiled:
        _check(found, found.verify(cluster).compiled_peak_bytes, budget, "as compiled needs", [])
    return found


def _planned(
    plan_or_step: Plan | Sharded | Callable[..., Any],
    args: tuple[Any, ...],
    cluster: Cluster | None,
    memory: str | float | None,
    options: dict[str, Any],
) -> Plan:
    if isinstance(plan_or_step, Plan):
        if args or options:
            raise FfjaxError("assert_fits was given a plan and arguments for a step. Remedy: give the plan alone.")
        if cluster is not None and (cluster.name, cluster.devices) != (plan_or_step.cluster, plan_or_step.devices):
            raise FfjaxError(
                f"assert_fits was given a plan for {plan_or_step.devices} devices of {plan_or_step.cluster!r} and a "
                f"cluster of {cluster.devices} of {cluster.name!r}. Remedy: give the step, to plan it for that cluster."
            )
        return plan_or_step
    try:
        if isinstance(plan_or_step, Sharded):
            if cluster is not None:
                raise FfjaxError(
                    "assert_fits was given cluster= and a step under autoshard, which has its own. Remedy: give the "
                    "function that autoshard was given."
                )
            return plan_or_step.plan(*args, **options)
        return plan(plan_or_step, *args, cluster=cluster, memory=memory, **options)
    except BudgetError as error:
        raise AssertionError(str(error)) from error


def _check(found: Plan, needed: float, budget: float, needs: str, more: list[str]) -> None:
    if needed > budget:
        first = (
            f"{found.program} on {found.devices} devices of {found.cluster!r} {needs} {amount(needed)} per device, "
            f"{amount(needed - budget)} more than {amount(budget)}."
        )
        raise AssertionError("\n".join([first, *more]))
