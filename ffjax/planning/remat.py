"""Rematerialization as a decision: one step, traced under each policy that its `jax.checkpoint` regions may have.

What a region recomputes is settled while JAX differentiates it, so each policy makes a program of its own, which is
searched like any other: what is kept and how it is sharded are decided together.
"""

from __future__ import annotations

import warnings

from ffjax.errors import FfjaxWarning, PlanError
from ffjax.ir.compat import AS_WRITTEN, CHECKPOINT_POLICIES
from ffjax.ir.trace import Program, trace
from ffjax.nnx import Call

SEARCH = "search"


def check_remat(remat: str) -> None:
    """Raises PlanError for what is neither a policy, nor `"as written"`, nor `"search"`."""
    known = (AS_WRITTEN, SEARCH, *CHECKPOINT_POLICIES)
    if remat not in known:
        raise PlanError(f"remat={remat!r} is none of {', '.join(map(repr, known))}. Remedy: give one of them.")


def trace_call(call: Call, remat: str = AS_WRITTEN) -> Program:
    """Traces a call that is a function of arrays, its `jax.checkpoint` regions under a policy.

    For `"search"` as written: `alternatives` gives the rest.
    """
    check_remat(remat)
    return trace(
        call.step,
        call.args,
        call.kwargs,
        static_argnums=call.static_argnums,
        static_argnames=call.static_argnames,
        donate_argnums=call.donate_argnums,
        donate_argnames=call.donate_argnames,
        remat=AS_WRITTEN if remat == SEARCH else remat,
    )


def under(call: Call, program: Program, policy: str) -> Program:
    """The program of a call under a policy; `program`, which is its program under one, if that is it."""
    if program.remat == policy:
        return program
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FfjaxWarning)  # what there is to say was said of `program`
        return trace_call(call, policy)


def alternatives(call: Call, program: Program, remat: str) -> tuple[Program, ...]:
    """For `remat="search"` the call's programs under other policies; none where it has no regions to decide."""
    if remat != SEARCH or not program.checkpoints:
        return ()
    return tuple(under(call, program, policy) for policy in CHECKPOINT_POLICIES)
