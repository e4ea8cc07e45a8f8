"""Flattens calls and lifts constants, so that a program is one jaxpr whose inputs are all its arrays.

Calls that XLA would inline anyway (jit, custom derivatives that AD left behind, remat regions without
a barrier) become plain equations. Loops, branches and remat regions with a barrier stay structured. Equal equations
of one body become one, as XLA will make them anyway: what runs once is counted once.
Arrays that the program closes over, at any depth, become its leading arguments, each once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import numpy as np

from ffjax.errors import FfjaxWarning
from ffjax.ir.compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    eliminate_dead_code,
    is_extended,
    placed,
    source_line,
    with_equations,
)

Atom = Var | Literal
Array = jax.Array | np.ndarray

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


def inline(closed: ClosedJaxpr) -> tuple[Jaxpr, tuple[Array, ...]]:
    """Returns `(jaxpr, closures)`: the jaxpr takes the arrays `closures` first, then its own arguments.

    Sharding constraints, which name a mesh that is not the plan's, are left out; one `FfjaxWarning` lists their lines.
    """
    dropped: dict[str, None] = {}
    jaxpr, closures = _Body(closed.jaxpr, closed.consts, dropped).build()
    if dropped:
        warnings.warn(
            f"the step has sharding constraints of its own ({', '.join(dropped)}), which are left out: the plan "
            "decides. Remedy: remove them; what must stay as it is can be pinned (pins=)",
            FfjaxWarning,
            stacklevel=2,
        )
    return eliminate_dead_code(jaxpr), closures


def is_barrier(eqn: JaxprEqn) -> bool:
    """Whether a remat equation lowers to a region that XLA may not merge with the forward pass."""
    return eqn.primitive.name in ("remat2", "checkpoint") and bool(
        eqn.params["differentiated"] and eqn.params["prevent_cse"]
    )


class _Body:
    """One jaxpr on its way to being flat: fresh variables, lifted constants, new equations."""

    def __init__(
        self, jaxpr: Jaxpr, consts: Iterable[Array], dropped: dict[str, None], caller: JaxprEqn | None = None
    ) -> None:
        self.jaxpr = jaxpr
        self.dropped = dropped
        self.caller = caller
        self.eqns: list[JaxprEqn] = []
        self.lifted: dict[int, tuple[Array, Var]] = {}
        self.env: dict[Var, Atom] = {}
        self.known: dict[object, list[Var]] = {}
        self.invars = [Var(v.aval) for v in jaxpr.invars]
        self.env.update(zip(jaxpr.invars, self.invars, strict=True))
        for var, const in zip(jaxpr.constvars, consts, strict=True):
            self.env[var] = self.lift(const, var.aval)

    def build(self) -> tuple[Jaxpr, tuple[Array, ...]]:
        self.add(self.jaxpr, self.env)
        outvars = [self.read(v, self.env) for v in self.jaxpr.outvars]
        arrays = [array for array, _ in self.lifted.values()]
        invars = [var for _, var in self.lifted.values()] + self.invars
        return with_equations(self.jaxpr, invars=invars, outvars=outvars, eqns=self.eqns), tuple(arrays)

    def lift(self, array: Array, aval: Any) -> Atom:  # noqa: ANN401  # JAX's abstract values have no common type
        if np.ndim(array) == 0 and not is_extended(aval.dtype):
            return Literal(np.asarray(array), aval)
        if id(array) not in self.lifted:
            self.lifted[id(array)] = (array, Var(aval))
        return self.lifted[id(array)][1]

    def read(self, atom: Atom, env: dict[Var, Atom]) -> Atom:
        if isinstance(atom, Literal):
            return atom if np.ndim(atom.val) == 0 else self.lift(atom.val, atom.aval)
        return env[atom]

    def add(self, jaxpr: Jaxpr, env: dict[Var, Atom]) -> None:
        for eqn in jaxpr.eqns:
            eqn = placed(eqn, self.caller)  # noqa: PLW2901
            operands = [self.read(v, env) for v in eqn.invars]
            name = eqn.primitive.name
            if name in _CALLS and not is_barrier(eqn):
                results = self.call(eqn, operands)
            elif name == "sharding_constraint":
                self.dropped[source_line(eqn)] = None
                results = operands
            else:
                params, extra = self.params(eqn)
                operands = _insert(eqn, operands, extra)
                key = _identity(eqn, operands)
                fresh = [Var(v.aval) for v in eqn.outvars]
                made = fresh if key is None else self.known.setdefault(key, fresh)
                if made is fresh:
                    self.eqns.append(eqn.replace(invars=operands, outvars=fresh, params=params))
                results = list(made)
            env.update(zip(eqn.outvars, results, strict=True))

    def call(self, eqn: JaxprEqn, operands: list[Atom]) -> list[Atom]:
        body: Jaxpr | ClosedJaxpr = eqn.params[_CALLS[eqn.primitive.name]]
        jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, ())
        env: dict[Var, Atom] = dict(zip(jaxpr.invars, operands, strict=True))
        env.update((v, self.lift(c, v.aval)) for v, c in zip(jaxpr.constvars, consts, strict=True))
        caller, self.caller = self.caller, eqn
        self.add(jaxpr, env)
        self.caller = caller
        return [self.read(v, env) for v in jaxpr.outvars]

    def params(self, eqn: JaxprEqn) -> tuple[dict[str, Any], dict[str, list[Atom]]]:
        """An equation's parameters with flat bodies, and the constants lifted out of each body."""
        params = dict(eqn.params)
        extra: dict[str, list[Atom]] = {}

        def flat(body: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, list[Atom]]:
            jaxpr, consts = (body.jaxpr, body.consts) if isinstance(body, ClosedJaxpr) else (body, ())
            new, arrays = _Body(jaxpr, consts, self.dropped, eqn).build()
            lifted = [self.lift(a, v.aval) for a, v in zip(arrays, new.invars, strict=False)]
            return new, lifted

        match eqn.primitive.name:
            case "scan":
                jaxpr, extra["jaxpr"] = flat(params["jaxpr"])
                params["jaxpr"] = ClosedJaxpr(jaxpr, ())
                params["num_consts"] += len(extra["jaxpr"])
                if "linear" in params:
                    params["linear"] = (False,) * len(extra["jaxpr"]) + tuple(params["linear"])
            case "while":
                for part in ("cond", "body"):
                    jaxpr, extra[part] = flat(params[f"{part}_jaxpr"])
                    params[f"{part}_jaxpr"] = ClosedJaxpr(jaxpr, ())
                    params[f"{part}_nconsts"] += len(extra[part])
            case "cond":
                params["branches"], extra["branches"] = self.branches(eqn)
            case "remat2" | "checkpoint":
                params["jaxpr"], extra["jaxpr"] = flat(params["jaxpr"])
        return params, extra

    def branches(self, eqn: JaxprEqn) -> tuple[tuple[ClosedJaxpr, ...], list[Atom]]:
        """All branches take the same operands, so each gets the constants of all, in front."""
        flat = [_Body(b.jaxpr, b.consts, self.dropped, eqn).build() for b in eqn.params["branches"]]
        shared = {id(a): (a, v.aval) for j, arrays in flat for a, v in zip(arrays, j.invars, strict=False)}
        made = []
        for jaxpr, arrays in flat:
            own = {id(a): v for a, v in zip(arrays, jaxpr.invars, strict=False)}
            front = [own.get(key) or Var(aval) for key, (_, aval) in shared.items()]
            invars = front + list(jaxpr.invars[len(arrays) :])
            made.append(ClosedJaxpr(with_equations(jaxpr, invars=invars, outvars=jaxpr.outvars, eqns=jaxpr.eqns), ()))
        return tuple(made), [self.lift(a, aval) for a, aval in shared.values()]


def _identity(eqn: JaxprEqn, operands: Sequence[Atom]) -> object | None:
    """A key that equal equations share; None for those that must all run, or that have bodies."""
    if eqn.effects or bodies(eqn):
        return None
    try:
        params = tuple(sorted(eqn.params.items()))
        hash(params)
    except TypeError:
        return None
    atoms = tuple([(_text(a.aval), np.asarray(a.val).tobytes()) if isinstance(a, Literal) else id(a) for a in operands])
    return (eqn.primitive, params, atoms, eqn.ctx.compute_type)


_text = functools.lru_cache(maxsize=1024)(str)


def _insert(eqn: JaxprEqn, operands: list[Atom], extra: dict[str, list[Atom]]) -> list[Atom]:
    """An equation's operands with those that its bodies' lifted constants add, each in its place."""
    match eqn.primitive.name:
        case "while":
            cond, body = extra["cond"], extra["body"]
            split = eqn.params["cond_nconsts"]
            return cond + operands[:split] + body + operands[split:]
        case "cond":
            return operands[:1] + extra["branches"] + operands[1:]
        case _:
            return extra.get("jaxpr", []) + operands


def walk(jaxpr: Jaxpr, visit: Callable[[JaxprEqn], None]) -> None:
    """Calls `visit` on every equation, bodies of loops, branches and remat regions included."""
    for eqn in jaxpr.eqns:
        visit(eqn)
        for body in bodies(eqn):
            walk(body, visit)


def bodies(eqn: JaxprEqn) -> list[Jaxpr]:
    """The jaxprs inside an equation that ffjax plans as part of the program."""
    match eqn.primitive.name:
        case "scan":
            return [eqn.params["jaxpr"].jaxpr]
        case "while":
            return [eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr]
        case "cond":
            return [b.jaxpr for b in eqn.params["branches"]]
        case "remat2" | "checkpoint":
            return [eqn.params["jaxpr"]]
        case _:
            return []
