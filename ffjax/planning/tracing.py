"""From a step as the user gives it, with its arguments, to a program."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from ffjax import nnx
from ffjax.arguments import ArgumentOptions, Names, Numbers
from ffjax.ir.compat import AS_WRITTEN
from ffjax.ir.trace import Program
from ffjax.planning.remat import trace_call


class Stepped:
    """A step that ffjax runs; what is planned is the user's, under it."""

    __wrapped__: Callable[..., Any]


def trace_step(
    step: Callable[..., Any] | Stepped,
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


def call_of(
    step: Callable[..., Any] | Stepped, args: Sequence[Any], kwargs: dict[str, Any], marks: ArgumentOptions
) -> nnx.Call:
    """A step and its arguments as a function of arrays; of a step under `autoshard` what is under it."""
    if isinstance(step, Stepped):
        step = step.__wrapped__
    return nnx.as_function(step, args, kwargs, *marks.of(step))
