"""The program as a graph of ops over values, loops and branches opened up: the side table of analyses.

The jaxpr stays the program. Here each of its variables is a `Value` and each equation an `Op`, in
execution order, whatever body it is in. What enters and leaves a body, an argument and a result are
ops too (`enter`, `exit`, `argument`, `result`), with rules of their own: a value can be sharded one way
outside a loop and another way inside, and the resharding between them happens where it is cheapest.
"""

from __future__ import annotations

import functools
from collections.abc import Hashable
from dataclasses import dataclass, field
from typing import Literal

import numpy as np

from ffjax.ir import compat
from ffjax.ir.compat import Jaxpr, JaxprEqn, Var
from ffjax.ir.compat import Literal as JaxLiteral
from ffjax.ir.equation_rules import alike, rules_for
from ffjax.ir.extra_rules import extra_rule
from ffjax.ir.inline import bodies, walk
from ffjax.ir.rules import OpShardingRule
from ffjax.ir.trace import Program

NO_VALUE = -1
"""Stands for an operand that is a literal."""


@dataclass(slots=True, kw_only=True)
class Value:
    """One array of the program. `constant`: made of literals by ops that the partitioner repeats for each reader, so
    that it is free in any sharding."""

    id: int
    shape: tuple[int, ...]
    dtype: str
    bytes: float
    scope: int
    producer: int = -1
    constant: bool = False


@dataclass(slots=True, kw_only=True)
class Op:
    """One equation, or one crossing of a body's border. `operands` may hold `NO_VALUE`.

    `alike`: ops that share it do the same: their equations are alike (`ffjax.ir.equation_rules.alike`), the same
    operands are literals, and they share a rule. Borders have -1.
    """

    id: int
    kind: str
    operands: tuple[int, ...]
    results: tuple[int, ...]
    rule: OpShardingRule
    scope: int
    eqn: JaxprEqn | None = None
    label: str = ""
    alike: int = -1


@dataclass(slots=True, kw_only=True)
class Scope:
    """The top level, or one body of a structured equation; `trips`: how often it runs in a step."""

    id: int
    parent: int
    kind: str
    trips: float
    enter: list[int] = field(default_factory=list)
    """For each of the body's arguments the op that brings it in."""
    exit: list[int] = field(default_factory=list)
    """For each of the body's results the op that takes it out."""


Port = tuple[int, Literal["operand", "result"], int]
"""One operand or result of an op: the op's id, the side, the index."""


@dataclass(slots=True, kw_only=True)
class Graph:
    """All of it. `ties` are pairs of ports that must be sharded alike (loop carries, donated state)."""

    program: Program
    values: list[Value] = field(default_factory=list)
    ops: list[Op] = field(default_factory=list)
    scopes: list[Scope] = field(default_factory=list)
    ties: list[tuple[Port, Port]] = field(default_factory=list)
    value_of: dict[Var, int] = field(default_factory=dict)
    op_of: dict[int, int] = field(default_factory=dict)
    """By `id` of an equation: its op, unless it is structured."""
    scopes_of: dict[int, list[int]] = field(default_factory=dict)
    """By `id` of a structured equation: its bodies' scopes, in the order of `inline.bodies`."""
    arguments: list[int] = field(default_factory=list)
    """Ops of the jaxpr's arguments: closures first."""
    outputs: list[int] = field(default_factory=list)
    """Ops of the jaxpr's results."""

    def source(self, op: Op) -> str:
        return compat.source_line(op.eqn) if op.eqn is not None else op.label


def build_graph(program: Program) -> Graph:
    """Builds the graph; every equation gets its op sharding rule (a warning names those without)."""
    return _Builder(program).build()


@functools.lru_cache(maxsize=4096)
def identity(shape: tuple[int, ...], operands: int = 1, results: int = 1) -> OpShardingRule:
    dims = tuple((d,) for d in range(len(shape)))
    return OpShardingRule(operands=(dims,) * operands, results=(dims,) * results, sizes=shape)


class _Builder:
    def __init__(self, program: Program) -> None:
        self.graph = Graph(program=program)
        eqns: list[JaxprEqn] = []
        walk(program.jaxpr, lambda e: None if bodies(e) else eqns.append(e))
        numbers = alike(eqns)
        first = dict(zip(reversed(numbers), reversed(eqns), strict=True))
        self.rules = dict(zip(first, rules_for(list(first.values())[::-1])[::-1], strict=True))
        self.number = {id(e): n for e, n in zip(eqns, numbers, strict=True)}
        self.alike: dict[tuple[int, tuple[bool, ...]], int] = {}
        self.arrays: dict[Hashable, tuple[tuple[int, ...], str, float]] = {}

    def build(self) -> Graph:
        graph, program = self.graph, self.graph.program
        top = self.scope(parent=-1, kind="top", trips=1.0)
        closures = [f"closure/{i}" for i in range(len(program.closures))]
        labels = closures + [leaf.path for leaf in program.args]
        for var, label in zip(program.jaxpr.invars, labels, strict=True):
            value = self.value(var, top)
            op = self.op("argument", (), (value,), identity(self.shape(value), 0), top, label=label)
            graph.arguments.append(op)
        self.body(program.jaxpr, top)
        for atom, leaf in zip(program.jaxpr.outvars, program.results, strict=True):
            op = self.op("result", (self.read(atom),), (), identity(leaf.shape, 1, 0), top, label=leaf.path)
            graph.outputs.append(op)
        for arg, result in program.ties:
            pair = (graph.arguments[len(closures) + arg], graph.outputs[result])
            graph.ties.append(((pair[0], "result", 0), (pair[1], "operand", 0)))
        return graph

    def scope(self, *, parent: int, kind: str, trips: float) -> int:
        self.graph.scopes.append(Scope(id=len(self.graph.scopes), parent=parent, kind=kind, trips=trips))
        return len(self.graph.scopes) - 1

    def value(self, var: Var, scope: int) -> int:
        index = len(self.graph.values)
        key = compat.shape_of(var), compat.dtype_of(var)
        if key not in self.arrays:
            dtype = np.dtype("bool") if key[1] is None else key[1]
            self.arrays[key] = key[0], str(dtype), compat.nbytes(key[0], dtype)
        shape, dtype_name, size = self.arrays[key]
        self.graph.values.append(Value(id=index, shape=shape, dtype=dtype_name, bytes=size, scope=scope))
        self.graph.value_of[var] = index
        return index

    def shape(self, value: int) -> tuple[int, ...]:
        return self.graph.values[value].shape

    def read(self, atom: object) -> int:
        return self.graph.value_of[atom] if isinstance(atom, Var) else NO_VALUE

    def op(
        self,
        kind: str,
        operands: tuple[int, ...],
        results: tuple[int, ...],
        rule: OpShardingRule,
        scope: int,
        *,
        eqn: JaxprEqn | None = None,
        label: str = "",
        alike: int = -1,
    ) -> int:
        index = len(self.graph.ops)
        self.graph.ops.append(
            Op(
                id=index,
                kind=kind,
                operands=operands,
                results=results,
                rule=rule,
                scope=scope,
                eqn=eqn,
                label=label,
                alike=alike,
            )
        )
        for value in results:
            self.graph.values[value].producer = index
        return index

    def body(self, jaxpr: Jaxpr, scope: int) -> None:
        for eqn in jaxpr.eqns:
            match eqn.primitive.name:
                case "scan":
                    self.scan(eqn, scope)
                case "while":
                    self.while_loop(eqn, scope)
                case "cond":
                    self.cond(eqn, scope)
                case "remat2" | "checkpoint":
                    self.remat(eqn, scope)
                case name:
                    operands = tuple([self.read(v) for v in eqn.invars])
                    results = tuple([self.value(v, scope) for v in eqn.outvars])
                    number = self.number[id(eqn)]
                    own = self.alike.setdefault((number, tuple([v < 0 for v in operands])), len(self.alike))
                    index = self.op(name, operands, results, self.rules[number], scope, eqn=eqn, alike=own)
                    self.graph.op_of[id(eqn)] = index
                    constant = all(v == NO_VALUE or self.graph.values[v].constant for v in operands)
                    if constant and _is_repeated(eqn, self.rules[number]):
                        for value in results:
                            self.graph.values[value].constant = True

    def enter(self, eqn: JaxprEqn, operand: int, var: Var, scope: int, *, stacked: bool = False) -> int:
        """The op that brings a value into a body; a stacked one loses its leading dimension."""
        value = self.value(var, scope)
        # A branch reshards what it reads itself, inside: the other branch, when that runs, need not.
        branch = self.graph.scopes[scope].kind == "cond"
        outer = scope if branch else self.graph.scopes[scope].parent
        if operand >= 0:
            rule = _unstack(self.graph.values[operand].shape) if stacked else identity(self.shape(value))
        else:
            rule = identity(self.shape(value))
        op = self.op("enter", (operand,), (value,), rule, outer, label=compat.source_line(eqn))
        self.graph.scopes[scope].enter.append(op)
        return op

    def leave(
        self, eqn: JaxprEqn, atom: Var | JaxLiteral, var: Var | None, scope: int, *, stacked: bool = False
    ) -> int:
        """The op that takes a body's result out, into `var` if it is the one that makes it."""
        operand = self.read(atom)
        outer = self.graph.scopes[scope].parent
        results = () if var is None else (self.value(var, outer),)
        shape = compat.shape_of(atom)
        if stacked and var is not None:
            unstack = _unstack(compat.shape_of(var))
            rule = OpShardingRule(
                operands=unstack.results,
                results=unstack.operands,
                sizes=unstack.sizes,
                need_replication=unstack.need_replication,
            )
        else:
            rule = identity(shape, 1, len(results))
        op = self.op("exit", (operand,), results, rule, scope, label=compat.source_line(eqn))
        self.graph.scopes[scope].exit.append(op)
        return op

    def tie(self, a: Port, b: Port) -> None:
        self.graph.ties.append((a, b))

    def scan(self, eqn: JaxprEqn, outer: int) -> None:
        jaxpr = eqn.params["jaxpr"].jaxpr
        trips = self.graph.scopes[outer].trips * eqn.params["length"]
        scope = self.scope(parent=outer, kind="scan", trips=trips)
        self.graph.scopes_of[id(eqn)] = [scope]
        consts, carries = compat.scan_counts(eqn.params)
        enters = [
            self.enter(eqn, self.read(atom), var, scope, stacked=i >= consts + carries)
            for i, (atom, var) in enumerate(zip(eqn.invars, jaxpr.invars, strict=True))
        ]
        self.body(jaxpr, scope)
        for i, (atom, var) in enumerate(zip(jaxpr.outvars, eqn.outvars, strict=True)):
            leave = self.leave(eqn, atom, var, scope, stacked=i >= carries)
            if i < carries:
                self.tie((enters[consts + i], "result", 0), (leave, "operand", 0))

    def while_loop(self, eqn: JaxprEqn, outer: int) -> None:
        cond, body = eqn.params["cond_jaxpr"].jaxpr, eqn.params["body_jaxpr"].jaxpr
        nc, nb = eqn.params["cond_nconsts"], eqn.params["body_nconsts"]
        trips = self.graph.scopes[outer].trips * trip_count(eqn)
        scopes = [self.scope(parent=outer, kind=f"while_{k}", trips=trips) for k in ("cond", "body")]
        self.graph.scopes_of[id(eqn)] = scopes
        init = list(eqn.invars[nc + nb :])
        enters = [
            [self.enter(eqn, self.read(a), v, scope) for a, v in zip(list(atoms) + init, jaxpr.invars, strict=True)]
            for scope, jaxpr, atoms in ((scopes[0], cond, eqn.invars[:nc]), (scopes[1], body, eqn.invars[nc : nc + nb]))
        ]
        self.body(cond, scopes[0])
        self.leave(eqn, cond.outvars[0], None, scopes[0])
        self.body(body, scopes[1])
        for i, (atom, var) in enumerate(zip(body.outvars, eqn.outvars, strict=True)):
            leave = self.leave(eqn, atom, var, scopes[1])
            self.tie((enters[1][nb + i], "result", 0), (leave, "operand", 0))
            self.tie((enters[1][nb + i], "result", 0), (enters[0][nc + i], "result", 0))

    def cond(self, eqn: JaxprEqn, outer: int) -> None:
        branches = bodies(eqn)
        trips = self.graph.scopes[outer].trips
        scopes = [self.scope(parent=outer, kind="cond", trips=trips) for _ in branches]
        self.graph.scopes_of[id(eqn)] = scopes
        leaves: list[list[int]] = []
        for scope, jaxpr in zip(scopes, branches, strict=True):
            # All branches take the same operands; what only another one reads does not enter this one.
            atoms = [*(v for inner in jaxpr.eqns for v in inner.invars), *jaxpr.outvars]
            read = {v for v in atoms if isinstance(v, Var)}
            for atom, var in zip(eqn.invars[1:], jaxpr.invars, strict=True):
                self.enter(eqn, self.read(atom) if var in read else NO_VALUE, var, scope)
            self.body(jaxpr, scope)
            last = scope == scopes[-1]
            leaves.append(
                [
                    self.leave(eqn, atom, var if last else None, scope)
                    for atom, var in zip(jaxpr.outvars, eqn.outvars, strict=True)
                ]
            )
        for other in leaves[:-1]:
            for a, b in zip(other, leaves[-1], strict=True):
                self.tie((a, "operand", 0), (b, "operand", 0))

    def remat(self, eqn: JaxprEqn, outer: int) -> None:
        jaxpr = eqn.params["jaxpr"]
        scope = self.scope(parent=outer, kind="remat", trips=self.graph.scopes[outer].trips)
        self.graph.scopes_of[id(eqn)] = [scope]
        for atom, var in zip(eqn.invars, jaxpr.invars, strict=True):
            self.enter(eqn, self.read(atom), var, scope)
        self.body(jaxpr, scope)
        for atom, var in zip(jaxpr.outvars, eqn.outvars, strict=True):
            self.leave(eqn, atom, var, scope)


def _is_repeated(eqn: JaxprEqn, rule: OpShardingRule) -> bool:
    """Whether Shardy makes an op of constants anew for each reader: iota, broadcasts, slices and elementwise ops."""
    if eqn.primitive.name in ("iota", "broadcast_in_dim", "slice"):
        return True
    own = rule.need_replication | rule.permutation | rule.reduction
    dims = {v for v in (*rule.operands, *rule.results) if v}
    return len(dims) <= 1 and not own and not eqn.effects and extra_rule(eqn) is None


@functools.lru_cache(maxsize=4096)
def _unstack(shape: tuple[int, ...]) -> OpShardingRule:
    """The rule of one step's slice of a stacked array: the leading dimension is walked, not split."""
    inner = tuple((d,) for d in range(1, len(shape)))
    return OpShardingRule(
        operands=(((0,), *inner),), results=(inner,), sizes=tuple(shape), need_replication=frozenset({0})
    )


def trip_count(eqn: JaxprEqn) -> int:
    """How often a while loop runs, when it counts from a literal to a literal; else 1."""
    cond = eqn.params["cond_jaxpr"].jaxpr
    if len(cond.eqns) != 1 or cond.eqns[0].primitive.name not in ("lt", "le"):
        return 1
    counter, limit = cond.eqns[0].invars
    carried = list(cond.invars[eqn.params["cond_nconsts"] :])
    if isinstance(counter, Var) and counter in carried and not isinstance(limit, Var):
        init = eqn.invars[eqn.params["cond_nconsts"] + eqn.params["body_nconsts"] + carried.index(counter)]
        if not isinstance(init, Var):
            trips: int = int(limit.val) - int(init.val) + (cond.eqns[0].primitive.name == "le")
            return max(1, trips)
    return 1
