"""What a compiled program communicates and holds, read from its scheduled HLO text.

Text, not protos: it is what every backend and every stored dump has. A collective is reported with the
convention of `Collective`, so that a plan's prediction and the compiler's result compare directly.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, TypeAlias, cast

import numpy as np

from ffjax.ir.spec import Collective, CollectiveKind, MeshShape

if TYPE_CHECKING:
    import jax

Groups: TypeAlias = tuple[tuple[int, ...], ...]
_ShapeTree: TypeAlias = "float | list[_ShapeTree]"  # bytes of an array, or a tuple's elements


@dataclass(frozen=True, slots=True, kw_only=True)
class CountedCollective:
    """A collective, how many times one run of the program does it, and the line that asks for it.

    `user` marks the ones that the program itself spells out, inside `shard_map`.
    """

    collective: Collective
    count: float
    source: str
    user: bool = False

    @property
    def total_bytes(self) -> float:
        return self.count * self.collective.bytes


def collectives_of(
    compiled_or_text: jax.stages.Compiled | str, mesh: MeshShape | None = None
) -> list[CountedCollective]:
    """The collectives of a compiled program, loops multiplied out, in the order of the text.

    Args:
      compiled_or_text: a compiled program, or its HLO text.
      mesh: names the axes that each collective runs over; without it, or where the devices of a group are no
        product of mesh axes, `axes` is empty.

    A loop whose trip count the compiler does not know counts once, and so does each branch of a conditional.
    """
    text = compiled_or_text if isinstance(compiled_or_text, str) else compiled_or_text.as_text()
    if text is None:
        raise ValueError(f"{compiled_or_text} has no HLO text; this backend does not give it: pass the text of a dump")
    module = _parse(text)
    return [
        CountedCollective(collective=one, count=count, source=_source(line, module))
        for computation, count in _reached(module)
        for line in module.computations[computation]
        if (one := _collective(line, module, mesh)) is not None
    ]


def peak_bytes(compiled: jax.stages.Compiled) -> int:
    """The memory that one device needs to run `compiled`: arguments, results and temporaries, shared ones once."""
    stats = compiled.memory_analysis()
    if stats is None:
        raise ValueError("the compiled program has no memory analysis; compile it for cpu, gpu or tpu")
    return int(
        stats.argument_size_in_bytes + stats.output_size_in_bytes + stats.temp_size_in_bytes - stats.alias_size_in_bytes
    )


def summarize(collectives: Iterable[CountedCollective]) -> dict[CollectiveKind, tuple[float, float]]:
    """For each kind: how many run, and their bytes together.

    >>> one = Collective(kind="all_gather", axes=("x",), bytes=64.0)
    >>> summarize([CountedCollective(collective=one, count=3.0, source="")])
    {'all_gather': (3.0, 192.0)}
    """
    totals: dict[CollectiveKind, tuple[float, float]] = {}
    for c in collectives:
        count, size = totals.get(c.collective.kind, (0.0, 0.0))
        totals[c.collective.kind] = (count + c.count, size + c.total_bytes)
    return totals


# -- groups of devices as mesh axes


def axes_of_groups(groups: Iterable[Iterable[int]], mesh: MeshShape) -> tuple[str, ...]:
    """The mesh axes along which the devices of each group differ; empty if they are no product of axes."""
    return _groupings(mesh).get(frozenset(frozenset(g) for g in groups), ())


def axes_of_pairs(pairs: Iterable[Sequence[int]], mesh: MeshShape) -> tuple[str, ...]:
    """The mesh axes along which any (source, target) pair of a permutation differs."""
    moved: set[str] = set()
    for source, target in pairs:
        if max(source, target) >= mesh.devices:
            return ()
        here, there = np.unravel_index(source, mesh.sizes), np.unravel_index(target, mesh.sizes)
        moved.update(axis for axis, a, b in zip(mesh.axes, here, there, strict=True) if a != b)
    return tuple(a for a in mesh.axes if a in moved)


@lru_cache(maxsize=64)
def _groupings(mesh: MeshShape) -> dict[frozenset[frozenset[int]], tuple[str, ...]]:
    ids = np.arange(mesh.devices).reshape(mesh.sizes)
    split = [i for i, n in enumerate(mesh.sizes) if n > 1]
    found: dict[frozenset[frozenset[int]], tuple[str, ...]] = {}
    for some in itertools.chain.from_iterable(itertools.combinations(split, n) for n in range(1, len(split) + 1)):
        kept = [i for i in range(len(mesh.sizes)) if i not in some]
        rows = ids.transpose(*kept, *some).reshape(-1, mesh.size(mesh.axes[i] for i in some)).tolist()
        found[frozenset(frozenset(row) for row in rows)] = tuple(mesh.axes[i] for i in some)
    return found


_GROUPS = re.compile(
    r"replica_groups=(?:"
    r"(?P<listed>\{(?:\{[\d,\s]*\},?\s*)*\})"
    r"|(?P<iota>\[[\d,]+\]<=\[[\d,]+\](?:T\([\d,]+\))?)"
    r"|mesh\[(?P<mesh>[^\]]*)\](?:,\s*device_ids=\((?P<ids>.*?\)?)\))?\s*\{(?P<used>[^}]*)\})"
)
_IOTA = re.compile(r"\[([\d,]+)\](?:<=\[([\d,]+)\])?(?:T\(([\d,]+)\))?")
_SUB_AXIS = re.compile(r"'?([^',:=\s]+)'?(?::\((\d+)\)(\d+))?")


def _ints(text: str) -> list[int]:
    return [int(n) for n in text.replace(" ", "").split(",") if n]


def _groups(line: str, devices: int) -> Groups:
    """The groups of a collective in any of the forms in which HLO prints them; none listed means all devices."""
    match = _GROUPS.search(line)
    everyone = (tuple(range(devices)),)
    if match is None:
        return everyone
    if match["listed"] is not None:
        return tuple(tuple(_ints(g)) for g in re.findall(r"\{([\d,\s]+)\}", match["listed"])) or everyone
    if match["iota"] is not None:
        shape, source, order = cast(re.Match[str], _IOTA.fullmatch(match["iota"])).groups()
        ids = np.arange(np.prod(_ints(source))).reshape(_ints(source))
        return _rows(ids.transpose(_ints(order)) if order else ids, _ints(shape)[-1])
    return _mesh_groups(match["mesh"], match["ids"], match["used"])


def _mesh_groups(axes: str, ids: str | None, used: str) -> Groups:
    sizes = {name: int(size) for name, size in re.findall(r"'?([^',=\s]+)'?=(\d+)", axes)}
    # A part of an axis is given by the size of what is major to it and its own: cut the axis at both ends.
    spans = [
        (n, int(before or 1), int(before or 1) * int(size or sizes[n])) for n, before, size in _SUB_AXIS.findall(used)
    ]
    segments: list[tuple[str, int, int]] = []
    for name, size in sizes.items():
        marks = sorted({1, size, *(m for n, *ends in spans if n == name for m in ends)})
        segments += [(name, a, b) for a, b in itertools.pairwise(marks)]
    chosen = [
        i for i, (name, a, b) in enumerate(segments) if any(n == name and lo <= a and b <= hi for n, lo, hi in spans)
    ]
    rest = [i for i in range(len(segments)) if i not in chosen]
    shape = [b // a for _, a, b in segments]
    grid = _device_order(ids, int(np.prod(shape))).reshape(shape).transpose(*rest, *chosen)
    return _rows(grid, int(np.prod([shape[i] for i in chosen])))


def _device_order(ids: str | None, devices: int) -> np.ndarray[tuple[int, ...], np.dtype[np.int_]]:
    if not ids:
        return np.arange(devices)
    if (iota := _IOTA.match(ids.strip())) is None:
        return np.array(_ints(ids))
    grid = np.arange(devices).reshape(_ints(iota[1]))
    return (grid.transpose(_ints(iota[3])) if iota[3] else grid).reshape(-1)


def _rows(ids: np.ndarray[tuple[int, ...], np.dtype[np.int_]], width: int) -> Groups:
    return tuple(tuple(row) for row in ids.reshape(-1, width).tolist())


# -- the text


@dataclass(slots=True, kw_only=True)
class _Module:
    entry: str = ""
    devices: int = 1
    computations: dict[str, list[str]] = field(default_factory=dict)
    files: dict[str, str] = field(default_factory=dict)
    locations: dict[str, tuple[str, str]] = field(default_factory=dict)
    frames: dict[str, str] = field(default_factory=dict)


_HEADER = re.compile(r"^(ENTRY\s+)?%?([\w.\-]+)\s.*\{\s*$|^(ENTRY\s+)?%?([\w.\-]+)\s*\{\s*$")
_KINDS: dict[str, CollectiveKind] = {
    "all-reduce": "all_reduce",
    "all-gather": "all_gather",
    "reduce-scatter": "reduce_scatter",
    "all-to-all": "all_to_all",
    "ragged-all-to-all": "all_to_all",
    "collective-permute": "collective_permute",
}
_OPCODE = re.compile(r"[\s)](" + "|".join(_KINDS) + r")(-start)?\(")
_CALLER = re.compile(r"[\s)](while|call|fusion|conditional|async-start|custom-call)\(")
_CALLEE = re.compile(r"\b(condition|body|calls|to_apply|true_computation|false_computation)=%?([\w.\-]+)")
_BRANCHES = re.compile(r"\b(?:branch_computations|called_computations)=\{([^}]*)\}")


def _parse(text: str) -> _Module:
    module = _Module()
    table, body = "", None
    for line in text.splitlines():
        if body is not None:
            if line.startswith("}"):
                body = None
            else:
                body.append(line)
        elif line.startswith("HloModule"):
            counts = [int(n) for n in re.findall(r"\b(?:num_partitions|replica_count)=(\d+)", line)]
            module.devices = int(np.prod(counts)) if counts else 1
        elif line in ("FileNames", "FunctionNames", "FileLocations", "StackFrames"):
            table = line
        elif table == "FileNames" and (match := re.match(r'(\d+) "(.*)"', line)):
            module.files[match[1]] = match[2]
        elif table == "FileLocations" and (match := re.match(r"(\d+) \{file_name_id=(\d+).*?\bline=(\d+)", line)):
            module.locations[match[1]] = (match[2], match[3])
        elif table == "StackFrames" and (match := re.match(r"(\d+) \{file_location_id=(\d+)", line)):
            module.frames[match[1]] = match[2]
        elif match := _HEADER.match(line):
            name = match[2] or match[4]
            body = module.computations.setdefault(name, [])
            if match[1] or match[3]:
                module.entry = name
    if not module.entry:
        raise ValueError(f"no ENTRY computation in HLO text that starts {text[:80]!r}; pass the whole module's text")
    return module


def _reached(module: _Module) -> Iterator[tuple[str, float]]:
    """Each computation that runs, with how often, once for every place that runs it."""
    stack = [(module.entry, 1.0)]
    while stack:
        name, count = stack.pop()
        yield name, count
        called: list[tuple[str, float]] = []
        for line in module.computations[name]:
            match = _CALLER.search(line)
            if match is None:
                continue
            callees = dict(_CALLEE.findall(line))
            if match[1] == "while":
                called.append((callees["body"], count * _trips(line, callees["condition"], module)))
                continue
            names = [n for role, n in _CALLEE.findall(line) if role != "condition"]
            for branches in _BRANCHES.findall(line):
                names += [n.strip().lstrip("%") for n in branches.split(",")]
            called += [(n, count) for n in names if n in module.computations]
        stack += reversed(called)


def _trips(line: str, condition: str, module: _Module) -> float:
    if match := re.search(r'"?known_trip_count"?:\s*\{"?n"?:\s*"?(\d+)', line):
        return float(match[1])
    # A counted loop from 0: its condition compares the counter with its only constant.
    lines = module.computations.get(condition, [])
    limits = [m[1] for ln in lines if (m := re.search(r"= [su]\d+\[\]\S* constant\((\d+)\)", ln))]
    compared = [ln for ln in lines if "direction=LT" in ln or "fusion(" in ln]
    return float(limits[0]) if len(limits) == 1 and compared else 1.0


def _collective(line: str, module: _Module, mesh: MeshShape | None) -> Collective | None:
    match = _OPCODE.search(line)
    equals = line.find(" = ")
    if match is None or not 0 <= equals < match.start() + 1:
        return None
    kind, is_start = _KINDS[match[1]], match[2] is not None
    tree = _shape_tree(line[equals + 3 : match.start() + 1])
    operand, result = 0.0, _bytes(tree)
    if is_start and isinstance(tree, list) and len(tree) > 1 and (kind != "all_reduce" or isinstance(tree[0], list)):
        # An asynchronous start holds (operands, results, context...); a plain all-reduce-start only the results.
        operand, result = _bytes(tree[0]), _bytes(tree[1])
    if kind == "collective_permute":
        found = re.search(r"source_target_pairs=\{((?:\{\d+,\s*\d+\},?\s*)*)\}", line)
        pairs = [_ints(p) for p in re.findall(r"\{([\d,\s]+)\}", found[1])] if found else []
        return Collective(kind, axes_of_pairs(pairs, mesh) if mesh else (), result)
    groups = _groups(line, mesh.devices if mesh and module.devices == 1 else module.devices)
    if kind == "reduce_scatter":
        result = operand or result * len(groups[0])
    return Collective(kind, axes_of_groups(groups, mesh) if mesh else (), result)


def _source(line: str, module: _Module) -> str:
    """`file:line` of an instruction where the text has it, else the name of the operation, else nothing."""
    if match := re.search(r'source_file="([^"]*)"(?:.*?source_line=(\d+))?', line):
        return f"{match[1]}:{match[2]}" if match[2] else match[1]
    if match := re.search(r"stack_frame_id=(\d+)", line):
        file, number = module.locations.get(module.frames.get(match[1], ""), ("", ""))
        if file in module.files:
            return f"{module.files[file]}:{number}"
    match = re.search(r'op_name="([^"]*)"', line)
    return match[1] if match else ""


# -- shapes

_ARRAY = re.compile(r"([a-z]\w*)\[([\d,<=\s]*)\](?:\{[^{}]*\})?|([()])")


def _shape_tree(text: str) -> _ShapeTree:
    stack: list[list[_ShapeTree]] = [[]]
    for dtype, dims, bracket in _ARRAY.findall(re.sub(r"/\*.*?\*/", "", text)):
        if bracket == "(":
            stack.append([])
        elif bracket == ")":
            done = stack.pop()
            stack[-1].append(done)
        else:
            sizes = _ints(dims.replace("<=", ""))
            stack[-1].append(float(np.prod(sizes, dtype=np.float64)) * dtype_bits(dtype) / 8)
    return stack[0][0] if len(stack[0]) == 1 else stack[0]


def _bytes(tree: _ShapeTree) -> float:
    return sum(_bytes(t) for t in tree) if isinstance(tree, list) else tree


def dtype_bits(name: str) -> int:
    """The bits of one element of an HLO type: `bf16`, `f8e4m3fn`, `s4`, `pred`, `c64`; 0 for tokens."""
    if name == "pred":
        return 8
    match = re.match(r"(?:bf|f|s|u|c)(\d+)", name)
    return int(match[1]) if match else 0
