"""Times ops on the devices that are here, as a step runs them: many in one program, on all devices at once.

    seconds = (one call of a program that runs the op `repeats` times, each after the one before) / repeats

A single call of one op would time the call. A barrier makes each run wait for the last, and keeps XLA from seeing that
they are all the same. Fake CPU devices share cores, so what one of them does alone is not what it does in a step:
every device runs the op.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from datetime import date
from statistics import median

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from ffjax.cost.profiles.profile import Analysis, Sample
from ffjax.errors import FfjaxError

OUTER, INNER = "outer", "inner"
"""The mesh axes that a case runs under; a collective is over the inner one."""

_RUNS = 5
_FEWEST_RUNS = 2
_CASE_S = 0.5  # of timed runs of one case, after which the fewest are enough
_PROGRAM_S = 0.02  # of one timed call: long beside the call itself
_MOST_REPEATS = 512
_TOGETHER = 6  # cases that are timed in turn, so that a slow moment of the machine hits several a little
_DIGITS = 4


@dataclass(frozen=True, slots=True, kw_only=True)
class Operand:
    """Random values; whole numbers are at least 0 and below `high`."""

    shape: tuple[int, ...]
    dtype: str
    high: int = 2


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Case:
    """One op at one local shape; the fields up to `bytes` are a `Sample`'s."""

    kind: str
    params: str = ""
    dtype: str = ""
    sizes: tuple[float, ...]
    flops: float
    bytes: float
    function: Callable[..., object]
    operands: tuple[Operand, ...]
    in_place: bool = False  # the result replaces the first operand
    group: int = 1  # devices along the inner mesh axis
    guess_s: float = 0.0  # what it may take

    @property
    def identity(self) -> tuple[object, ...]:
        return (self.kind, self.params, self.dtype, self.sizes)


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What came of measuring: samples, and for each case without one why not."""

    samples: tuple[Sample, ...]
    failed: tuple[tuple[Case, str], ...]
    left_out: tuple[Case, ...]  # for want of time


Clock = Callable[[], float]
Runner = Callable[[], None]
Progress = Callable[[str, float], None]


def measure(
    cases: Sequence[Case],
    devices: Sequence[jax.Device],
    *,
    seconds: float = float("inf"),
    progress: Progress | None = None,
    clock: Clock = time.perf_counter,
    prepare: Callable[[Case, Sequence[jax.Device]], tuple[Runner, int]] | None = None,
) -> Measured:
    """Times cases in their order until the time is up.

    Args:
      cases: what to time.
      devices: where, all of them at once.
      seconds: when to stop, compiling included.
      progress: is told what is measured, and the share that is done.
      clock: tells the time in seconds.
      prepare: makes a case's program, returns it and how often it runs the op.
    """
    began = clock()
    prepare = prepare or prepare_program
    samples: list[Sample] = []
    failed: list[tuple[Case, str]] = []
    done = 0
    for first in range(0, len(cases), _TOGETHER):
        if clock() - began > seconds:
            break
        chunk: list[tuple[Case, Runner, int]] = []
        for case in cases[first : first + _TOGETHER]:
            if progress:
                share = max(done / len(cases), (clock() - began) / seconds if seconds < float("inf") else 0.0)
                progress(describe(case), min(share, 1.0))
            done += 1
            try:
                run, repeats = prepare(case, devices)
                run()  # compiles and warms up
                chunk.append((case, run, repeats))
            except Exception as error:  # what a compiler or an allocator raises is its own affair
                failed.append((case, f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"))
        times: list[list[float]] = [[] for _ in chunk]
        for turn in range(_RUNS):
            for index, (_, run, repeats) in enumerate(chunk):
                if turn >= _FEWEST_RUNS and sum(times[index]) * repeats > _CASE_S:
                    continue
                start = clock()
                run()
                times[index].append((clock() - start) / repeats)
        samples += [_sample(case, own) for (case, _, _), own in zip(chunk, times, strict=True)]
    return Measured(samples=tuple(samples), failed=tuple(failed), left_out=tuple(cases[done:]))


def describe(case: Case) -> str:
    """`matmul bfloat16 1x256x256x256`."""
    return " ".join(filter(None, [case.kind, case.dtype, "x".join(f"{s:g}" for s in case.sizes)]))


def analyse(cases: Sequence[Case], progress: Progress | None = None) -> tuple[Analysis, ...]:
    """XLA's cost analysis of each case, compiled alone for this process's default backend; those without are left out.

    Flops of a loop's body count once there, and a library's call not at all: it is asked op by op.
    """
    found = []
    for done, case in enumerate(cases):
        if progress:
            progress(f"compiles {describe(case)}", done / len(cases))
        structs = [jax.ShapeDtypeStruct(o.shape, o.dtype) for o in case.operands]
        try:
            costs = jax.jit(case.function).lower(*structs).compile().cost_analysis() or {}
        except Exception:  # as above; what cannot be compiled alone is counted
            continue
        if costs.get("bytes accessed", -1.0) > 0 and costs.get("flops", -1.0) >= 0:
            found.append(
                Analysis(
                    kind=case.kind,
                    params=case.params,
                    dtype=case.dtype,
                    sizes=case.sizes,
                    flops=case.flops,
                    bytes=case.bytes,
                    compiled_flops=float(costs["flops"]),
                    compiled_bytes=float(costs["bytes accessed"]),
                )
            )
    return tuple(found)


def prepare_program(case: Case, devices: Sequence[jax.Device]) -> tuple[Runner, int]:
    """A program that runs a case's op many times on each device, and how many times."""
    if len(devices) % case.group:
        raise FfjaxError(f"{len(devices)} devices form no groups of {case.group}")
    repeats = int(min(max(_PROGRAM_S / max(case.guess_s, 1e-9), 1), _MOST_REPEATS))
    mesh = Mesh(np.array(devices).reshape(-1, case.group), (OUTER, INNER))
    stacked = PartitionSpec((OUTER, INNER))

    def local(*pieces: jax.Array) -> object:
        operands = [p[0] for p in pieces]
        shapes = jax.eval_shape(case.function, *operands)
        start = operands[0] if case.in_place else jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), shapes)

        def again(_: int, carry: tuple[list[jax.Array], object]) -> tuple[list[jax.Array], object]:
            given, last = lax.optimization_barrier(carry)
            return given, case.function(*([last, *given] if case.in_place else given))

        _, end = lax.fori_loop(0, repeats, again, (operands[1:] if case.in_place else operands, start))
        return jax.tree.map(lambda v: v[None], end)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=stacked, out_specs=stacked, check_vma=False)
    program = jax.jit(mapped, donate_argnums=(0,) if case.in_place else ())
    arrays = [_random(o, i, NamedSharding(mesh, stacked), len(devices)) for i, o in enumerate(case.operands)]

    def run() -> None:
        result = jax.block_until_ready(program(*arrays))
        if case.in_place:
            arrays[0] = result

    return run, repeats


def _random(operand: Operand, seed: int, sharding: NamedSharding, count: int) -> jax.Array:
    """One operand for each device, stacked. Random: equal values would spare a GPU's power."""
    shape, dtype = (count, *operand.shape), jnp.dtype(operand.dtype)

    def make() -> jax.Array:
        key = jax.random.key(seed)
        if jnp.issubdtype(dtype, jnp.inexact):
            return jax.random.normal(key, shape, dtype)
        return jax.random.randint(key, shape, 0, operand.high).astype(dtype)

    made: jax.Array = jax.jit(make, out_shardings=sharding)()
    return made


def _sample(case: Case, times: Sequence[float]) -> Sample:
    ordered = sorted(times)
    middle = median(ordered)
    quarter = len(ordered) // 4
    spread = (ordered[-1 - quarter] - ordered[quarter]) / 2 / middle if middle else 0.0
    return Sample(
        kind=case.kind,
        params=case.params,
        dtype=case.dtype,
        sizes=case.sizes,
        flops=case.flops,
        bytes=case.bytes,
        seconds=_rounded(max(middle, 1e-12)),
        spread=_rounded(spread),
        runs=len(times),
        date=date.today().isoformat(),
    )


def _rounded(value: float) -> float:
    return float(f"{value:.{_DIGITS}g}")


def spread_out(count: int) -> Iterator[int]:
    """0 to count-1 so that any beginning of it is spread over all: by reversed bits (van der Corput)."""
    bits = max(count - 1, 1).bit_length()
    return (i for i in (int(f"{n:0{bits}b}"[::-1], 2) for n in range(1 << bits)) if i < count)
