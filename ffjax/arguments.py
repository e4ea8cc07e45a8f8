"""Which arguments of a step are static and which are donated: by number and by name, as `jax.jit` reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass
from inspect import Parameter
from typing import Any, TypeVar

from ffjax.errors import PlanError
from ffjax.ir.trace import function_name

_T = TypeVar("_T", int, str)
Numbers = int | Sequence[int] | None
Names = str | Iterable[str] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Marked:
    """Arguments by number, as a call may pass them by position, and by name, as it may pass them by keyword."""

    argnums: tuple[int, ...]
    argnames: tuple[str, ...]

    def numbers(self, count: int) -> tuple[int, ...]:
        """Those among so many positional arguments of a call, none negative."""
        return tuple(dict.fromkeys(n % count for n in self.argnums if -count <= n < count))

    def names(self, keywords: Collection[str]) -> tuple[str, ...]:
        """Those among the keywords of a call."""
        return tuple(name for name in self.argnames if name in keywords)


@dataclass(frozen=True, slots=True, kw_only=True)
class ArgumentOptions:
    """Static and donated arguments of a step, as `jax.jit` takes them.

    Where only numbers or only names are given, the step's signature says the others, so that it does not matter how
    a call passes the argument; where both are given, they are taken as they are.
    """

    static_argnums: Numbers = None
    static_argnames: Names = None
    donate_argnums: Numbers = None
    donate_argnames: Names = None

    def of(self, step: Callable[..., Any]) -> tuple[Marked, Marked]:
        """The static and the donated arguments of a step; raises PlanError for some that it cannot have.

        >>> static, _ = ArgumentOptions(static_argnames="n").of(lambda x, n: x * n)
        >>> static
        Marked(argnums=(1,), argnames=('n',))
        """
        static = _marked(step, "static", self.static_argnums, self.static_argnames)
        donated = _marked(step, "donate", self.donate_argnums, self.donate_argnames)
        both = [*(set(static.argnames) & set(donated.argnames)), *(set(static.argnums) & set(donated.argnums))]
        if both:
            raise PlanError(
                f"argument {both[0]} of {function_name(step)} is static and donated. Remedy: donate arrays only; a "
                "static argument has none."
            )
        return static, donated


def _marked(step: Callable[..., Any], kind: str, numbers: Numbers, names: Names) -> Marked:
    given_numbers = _sequence(numbers, int, f"{kind}_argnums", "positions, such as {}=0")
    given_names = _sequence(names, str, f"{kind}_argnames", "names, such as {}='config'")
    parameters = _parameters(step)
    if parameters is None:
        return Marked(argnums=given_numbers, argnames=given_names)
    _check_numbers(parameters, given_numbers, f"{function_name(step)}: {kind}_argnums={numbers!r}")
    _check_names(parameters, given_names, f"{function_name(step)}: {kind}_argnames={names!r}")
    either = [(i, p.name) for i, p in enumerate(parameters) if p.kind is Parameter.POSITIONAL_OR_KEYWORD]
    if numbers is None:
        given_numbers = tuple(i for i, name in either if name in given_names)
    if names is None:
        given_names = tuple(name for i, name in either if i in given_numbers)
    return Marked(argnums=given_numbers, argnames=given_names)


def _sequence(given: _T | Iterable[_T] | None, kind: type[_T], option: str, remedy: str) -> tuple[_T, ...]:
    if given is None:
        return ()
    values = tuple(given) if isinstance(given, Iterable) and not isinstance(given, kind) else (given,)
    for value in values:
        if not isinstance(value, kind):
            what = "number" if kind is int else "name"
            raise PlanError(f"{option}={given!r}: {value!r} is no {what}. Remedy: {remedy.format(option)}.")
    return values


def _parameters(step: Callable[..., Any]) -> list[Parameter] | None:
    """None for some builtins, which do not tell."""
    try:
        return list(inspect.signature(step).parameters.values())
    except (TypeError, ValueError):
        return None


def _check_numbers(parameters: Sequence[Parameter], numbers: Sequence[int], given: str) -> None:
    if any(p.kind is Parameter.VAR_POSITIONAL for p in parameters):
        return
    count = sum(p.kind in (Parameter.POSITIONAL_ONLY, Parameter.POSITIONAL_OR_KEYWORD) for p in parameters)
    for number in numbers:
        if not -count <= number < count:
            raise PlanError(
                f"{given}: there is no argument {number}, it takes {count}. Remedy: count positional arguments from 0; "
                "those that are keywords only have names."
            )


def _check_names(parameters: Sequence[Parameter], names: Sequence[str], given: str) -> None:
    known = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)}
    positional = {p.name for p in parameters if p.kind in (Parameter.POSITIONAL_ONLY, Parameter.VAR_POSITIONAL)}
    any_name = any(p.kind is Parameter.VAR_KEYWORD for p in parameters)
    for name in names:
        if name in positional:
            raise PlanError(f"{given}: {name!r} cannot be passed by keyword. Remedy: give its number.")
        if name not in known and not any_name:
            raise PlanError(f"{given}: there is no argument {name!r}. Remedy: one of {', '.join(sorted(known))}.")
