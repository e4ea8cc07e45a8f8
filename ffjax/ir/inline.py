"""Flattens calls and lifts constants, so that a program is one jaxpr whose inputs are all its arrays.

Calls that XLA would inline anyway (jit, custom derivatives that AD left behind, linear solves, remat regions without a
barrier, other libraries' primitives that lower by tracing a function) become plain equations. Loops, branches and
remat regions with a barrier stay structured. Equal equations of one body become one, as XLA will make them anyway:
what runs once is counted once.
Arrays that the program closes over, at any depth, become its leading arguments, each once.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import jax
import jax.extend.core
import numpy as np
from jax.sharding import NamedSharding

from ffjax.errors import FfjaxWarning
from ffjax.ir.compat import (
    ClosedJaxpr,
    Jaxpr,
    JaxprEqn,
    Literal,
    Var,
    constraint,
    constraint_of,
    eliminate_dead_code,
    expansion,
    is_extended,
    placed,
    shape_of,
    source_line,
    struct_of,
    unordered,
    with_equations,
    with_scan_body,
)
from ffjax.ir.extra_rules import has_own_rule

Atom = Var | Literal
Array = jax.Array | np.ndarray

_CALLS = {
    "jit": "jaxpr",
    "pjit": "jaxpr",
    "closed_call": "call_jaxpr",
    "core_call": "call_jaxpr",
    "eval_jaxpr": "call_jaxpr",
    "custom_jvp_call": "call_jaxpr",
    "custom_vjp_call": "call_jaxpr",
    "custom_vjp_call_jaxpr": "fun_jaxpr",
    "custom_vmap_call": "call",
    "linear_call": "callee",
    "remat2": "jaxpr",
    "checkpoint": "jaxpr",
}


Lines = dict[str, dict[str, None]]
"""What the plan cannot keep of a step, as a sentence with room for the lines where it is."""

_CONSTRAINTS = (
    "sharding constraints of its own ({}), which are left out: the plan decides. Remedy: a plan on their mesh (mesh=, "
    "strategy='auto') keeps them; keep_shardings=False leaves them out without a word"
)
_ORDER = "ordered prints or callbacks ({}), which come in any order on several devices. Remedy: ordered=False"


Keeps = Callable[[NamedSharding], bool]


def over_devices(sharding: NamedSharding) -> bool:
    """Whether a sharding says anything: one over a single device does not."""
    return bool(sharding.mesh.size > 1)


def inline(closed: ClosedJaxpr, keeps: Keeps = over_devices) -> tuple[Jaxpr, tuple[Array, ...]]:
    """Returns `(jaxpr, closures)`: the jaxpr takes the arrays `closures` first, then its own arguments.

    Sharding constraints stay where `keeps` says so, and so do the shardings of a `jit` inside, as constraints. Others
    are left out, and so is the order of debug prints; one `FfjaxWarning` of each lists their lines.
    """
    dropped: Lines = {}
    jaxpr, closures = _Body(closed.jaxpr, closed.consts, dropped, keeps).build()
    for what, lines in dropped.items():
        warnings.warn(f"the step has {what.format(', '.join(lines))}", FfjaxWarning, stacklevel=2)
    return eliminate_dead_code(jaxpr), closures


def is_barrier(eqn: JaxprEqn) -> bool:
    """Whether a remat equation lowers to a region that XLA may not merge with the forward pass."""
    return eqn.primitive.name in ("remat2", "checkpoint") and bool(
        eqn.params["differentiated"] and eqn.params["prevent_cse"]
    )


class _Body:
    """One jaxpr on its way to being flat: fresh variables, lifted constants, new equations."""

    def __init__(
        self, jaxpr: Jaxpr, consts: Iterable[Array], dropped: Lines, keeps: Keeps, caller: JaxprEqn | None = None
    ) -> None:
        self.jaxpr = jaxpr
        self.dropped = dropped
        self.keeps = keeps
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
            given = _scalar_test(placed(eqn, self.caller))
            eqn = unordered(given)  # noqa: PLW2901
            if eqn is not given:
                self.dropped.setdefault(_ORDER, {})[source_line(eqn)] = None
            operands = [self.read(v, env) for v in eqn.invars]
            name = eqn.primitive.name
            if name in _CALLS and not is_barrier(eqn):
                operands = self.constrained(eqn, "in_shardings", operands)
                results = self.call(eqn, eqn.params[_CALLS[name]], operands)
                results = self.constrained(eqn, "out_shardings", results)
            elif not has_own_rule(eqn) and (body := expansion(eqn)) is not None:
                results = self.call(eqn, body, operands)
            elif name == "custom_linear_solve":
                # As it lowers: the solver, on its own constants and the right-hand sides.
                counts = eqn.params["const_lengths"]
                start, stop = counts.matvec + counts.vecmat, sum(counts)
                own = operands[start : start + counts.solve] + operands[stop:]
                results = self.call(eqn, eqn.params["jaxprs"].solve, own)
            elif name in ("sharding_constraint", "shard_alike") and not self.stays(eqn, constraint_of(eqn)):
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

    def stays(self, eqn: JaxprEqn, sharding: NamedSharding | None) -> bool:
        """Whether a constraint of an equation's is kept; takes down the line of one that is left out."""
        if sharding is not None and self.keeps(sharding):
            return True
        if sharding is None or over_devices(sharding):
            self.dropped.setdefault(_CONSTRAINTS, {})[source_line(eqn)] = None
        return False

    def constrained(self, eqn: JaxprEqn, which: str, atoms: list[Atom]) -> list[Atom]:
        """What goes into or comes out of a `jit`, under the shardings that it was given."""
        held = list(atoms)
        for i, sharding in enumerate(eqn.params.get(which, ())):
            if isinstance(sharding, NamedSharding) and self.stays(eqn, sharding):
                self.eqns.append(constraint(held[i], sharding, eqn))
                held[i] = self.eqns[-1].outvars[0]
        return held

    def call(self, eqn: JaxprEqn, body: Jaxpr | ClosedJaxpr, operands: list[Atom]) -> list[Atom]:
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
            new, arrays = _Body(jaxpr, consts, self.dropped, self.keeps, eqn).build()
            lifted = [self.lift(a, v.aval) for a, v in zip(arrays, new.invars, strict=False)]
            return new, lifted

        match eqn.primitive.name:
            case "scan":
                jaxpr, extra["jaxpr"] = flat(params["jaxpr"])
                params = with_scan_body(params, ClosedJaxpr(jaxpr, ()), len(extra["jaxpr"]))
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
        flat = [_Body(b.jaxpr, b.consts, self.dropped, self.keeps, eqn).build() for b in eqn.params["branches"]]
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


def _scalar_test(eqn: JaxprEqn) -> JaxprEqn:
    """A loop whose test is one for each example (a `while_loop` under `vmap`) as one that tests whether any goes on.

    That is what JAX lowers it to; here the reduction over examples, and the examples that stay, are ops to plan.
    """
    if eqn.primitive.name != "while" or not shape_of(eqn.params["cond_jaxpr"].jaxpr.outvars[0]):
        return eqn
    test, body = eqn.params["cond_jaxpr"], eqn.params["body_jaxpr"]
    tested, read = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]

    def goes_on(*args: jax.Array) -> jax.Array:
        each: jax.Array = jax.extend.core.jaxpr_as_fun(test)(*args)[0]
        return each.any()

    def advance(*args: jax.Array) -> list[jax.Array]:
        consts, carry = args[:tested], args[tested + read :]
        each = jax.extend.core.jaxpr_as_fun(test)(*consts, *carry)[0]
        new = jax.extend.core.jaxpr_as_fun(body)(*args[tested:])
        return [
            jax.lax.select(jax.lax.broadcast_in_dim(each, a.shape, range(each.ndim)), a, b)
            for a, b in zip(new, carry, strict=True)
        ]

    avals = [struct_of(v) for v in (*eqn.invars[:tested], *body.jaxpr.invars)]
    params = dict(eqn.params) | {
        "cond_jaxpr": jax.make_jaxpr(goes_on)(*avals[:tested], *avals[tested + read :]),
        "body_jaxpr": jax.make_jaxpr(advance)(*avals),
        "body_nconsts": tested + read,
    }
    scalar: JaxprEqn = eqn.replace(invars=[*eqn.invars[:tested], *eqn.invars], params=params)
    return scalar


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
