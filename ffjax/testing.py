"""For tests of sharded programs: fake devices, same numerics as unsharded, and the collectives of a program.

>>> devices = fake_devices(8)  # doctest: +SKIP
>>> assert_same_numerics(sharded_step(state, batch), step(state, batch))  # doctest: +SKIP
>>> assert_collectives(sharded_step.lower(state, batch), {"all_reduce": 4096})  # doctest: +SKIP
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

from ffjax.cost.hlo.collectives import collectives_of
from ffjax.errors import FfjaxError
from ffjax.ir.spec import COLLECTIVE_KINDS, CollectiveKind, summarize

_MAX_SHOWN = 10  # leaves in one message; the rest are only counted


def fake_devices(n: int = 8, *, cpu_only: bool = True) -> list[jax.Device]:
    """`n` CPU devices in this process, however many cores there are.

    Call it before JAX runs anything: JAX counts its devices once. `cpu_only` also keeps JAX from using
    an accelerator; pass False to have fake devices beside real ones.

    Raises:
        FfjaxError: JAX has started already, with fewer CPU devices or with an accelerator as its default.

    >>> len(fake_devices(8))
    8
    """
    if n < 1:
        raise FfjaxError(f"fake_devices({n}): ask for at least one device")
    if cpu_only:
        jax.config.update("jax_platforms", "cpu")
    with contextlib.suppress(RuntimeError):  # JAX has started: what it started with may still be enough
        jax.config.update("jax_num_cpu_devices", n)
    devices = jax.devices("cpu")
    remedy = "call ffjax.testing.fake_devices before anything runs on JAX, or set"
    if len(devices) < n:
        raise FfjaxError(
            f"fake_devices({n}): JAX has started already with {len(devices)} CPU device(s); "
            f"{remedy} XLA_FLAGS=--xla_force_host_platform_device_count={n}"
        )
    if cpu_only and jax.default_backend() != "cpu":
        raise FfjaxError(
            f"fake_devices({n}): JAX has started already on {jax.default_backend()}; {remedy} JAX_PLATFORMS=cpu, "
            "or pass cpu_only=False"
        )
    return devices[:n]


@dataclass(frozen=True, slots=True, kw_only=True)
class Tolerance:
    """`|actual - expected| <= rtol * |expected| + atol`; `atol` grows with the leaf: `atol_of_max * max|expected|`.

    A sum that is split over devices errs in proportion to its terms, not to its result, which is why a
    leaf's small elements may be as wrong as its large ones. `floor` is for leaves that are nothing but
    rounding (the gradient of a bias before a normalisation).
    """

    rtol: float
    atol_of_max: float
    floor: float


_TOLERANCES = {
    "float64": Tolerance(rtol=1e-9, atol_of_max=1e-10, floor=1e-16),
    "float32": Tolerance(rtol=1e-4, atol_of_max=1e-5, floor=1e-8),
    "float16": Tolerance(rtol=4e-3, atol_of_max=4e-3, floor=1e-8),
    "bfloat16": Tolerance(rtol=2e-2, atol_of_max=2e-2, floor=1e-8),
}


def tolerance_of(dtype: np.dtype) -> Tolerance:
    """How far two results of one computation may differ when only the order of its sums does (inexact dtypes)."""
    if jnp.issubdtype(dtype, jnp.complexfloating):
        dtype = np.empty(0, dtype).real.dtype
    few_bits = 2 * float(jnp.finfo(dtype).eps)
    return _TOLERANCES.get(dtype.name, Tolerance(rtol=few_bits, atol_of_max=few_bits, floor=1e-8))


def assert_same_numerics(
    actual: object, expected: object, *, rtol: float | None = None, atol: float | None = None, name: str = ""
) -> None:
    """Compares two pytrees leaf by leaf, each within the tolerance of its dtype.

    Integers, booleans and random keys must be equal. NaN equals NaN.

    Args:
        actual, expected: pytrees of arrays with the same paths; leaves must agree in shape and dtype.
        rtol: relative tolerance of inexact leaves, in place of the dtype's own.
        atol: absolute tolerance of inexact leaves, in place of the dtype's own (which grows with the leaf).
        name: what is compared, for the message.

    Raises:
        AssertionError: names each leaf that differs, its worst element, both values and the tolerance.

    >>> assert_same_numerics({"w": jnp.ones(3)}, {"w": jnp.ones(3) + 1e-6})
    """
    got, want = _leaves(actual), _leaves(expected)
    problems = [f"{path}: missing" for path in want if path not in got]
    problems += [f"{path}: not expected" for path in got if path not in want]
    problems += [
        f"{path}: {problem}"
        for path, leaf in want.items()
        if path in got and (problem := _difference(got[path], leaf, rtol, atol))
    ]
    if problems:
        shown = problems[:_MAX_SHOWN]
        if len(problems) > len(shown):
            shown.append(f"and {len(problems) - len(shown)} more")
        title = f"{name}: " if name else ""
        raise AssertionError("\n  ".join([f"{title}{len(problems)} of {len(want.keys() | got)} leaves differ", *shown]))


def assert_collectives(
    program: jax.stages.Lowered | jax.stages.Compiled, expected: Mapping[CollectiveKind, float], *, rtol: float = 0.1
) -> None:
    """Checks how many bytes each kind of collective moves in one run of a program.

    Args:
        program: a lowered or compiled program; a lowered one is compiled first.
        expected: bytes by kind, as one device holds them of the larger side (`ffjax.ir.spec.Collective`).
            A kind that is not named must not occur.
        rtol: relative tolerance of each kind's bytes.

    Raises:
        AssertionError: shows both, and the measured mapping ready to paste.
    """
    if unknown := expected.keys() - set(COLLECTIVE_KINDS):
        raise FfjaxError(f"no such collective: {sorted(unknown)}; the kinds are {', '.join(COLLECTIVE_KINDS)}")
    actual = _collective_bytes(program)
    problems = [
        f"{kind}: {actual.get(kind, 0):,.0f} bytes, expected {expected.get(kind, 0):,.0f} within {rtol:.0%}"
        for kind in COLLECTIVE_KINDS
        if abs(actual.get(kind, 0) - expected.get(kind, 0)) > rtol * expected.get(kind, 0)
    ]
    if problems:
        raise AssertionError("\n  ".join(["the program's collectives differ", *problems, f"it has: {dict(actual)}"]))


def _collective_bytes(program: jax.stages.Lowered | jax.stages.Compiled) -> Mapping[CollectiveKind, float]:
    compiled = program.compile() if isinstance(program, jax.stages.Lowered) else program
    return {kind: total_bytes for kind, (_, total_bytes) in summarize(collectives_of(compiled)).items()}


def _leaves(tree: object) -> dict[str, ArrayLike]:
    return {jax.tree_util.keystr(path) or "(root)": leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def _difference(actual: ArrayLike, expected: ArrayLike, rtol: float | None, atol: float | None) -> str | None:
    """What is wrong with a leaf, or None."""
    # A Python number has no dtype of its own: it takes the other's.
    dtype = getattr(expected, "dtype", None) or getattr(actual, "dtype", None) or np.result_type(expected)
    got_dtype = getattr(actual, "dtype", dtype)
    if np.shape(actual) != np.shape(expected) or got_dtype != dtype:
        return f"is {_type(got_dtype, np.shape(actual))}, expected {_type(dtype, np.shape(expected))}"
    if jnp.issubdtype(dtype, jax.dtypes.prng_key):
        return _difference(jax.random.key_data(actual), jax.random.key_data(expected), rtol, atol)
    got, want = np.asarray(actual, dtype), np.asarray(expected, dtype)
    same = (got == want) | ((got != got) & (want != want))
    if not jnp.issubdtype(dtype, jnp.inexact):
        excess, how = np.where(same, 0.0, 1.0), "must be equal"
    else:
        wide = np.complex128 if jnp.issubdtype(dtype, jnp.complexfloating) else np.float64
        got, want = got.astype(wide), want.astype(wide)
        largest = float(np.max(np.abs(want), where=np.isfinite(want), initial=0.0))
        tolerance = tolerance_of(dtype)
        rtol = tolerance.rtol if rtol is None else rtol
        atol = max(tolerance.atol_of_max * largest, tolerance.floor) if atol is None else atol
        with np.errstate(invalid="ignore"):  # infinities and NaN, which no tolerance covers
            excess = np.abs(got - want) - (rtol * np.abs(want) + atol)
        excess = np.where(same, 0.0, np.where(np.isnan(excess), np.inf, excess))
        how = f"rtol {rtol:.3g}, atol {atol:.3g}"
    wrong = int(np.count_nonzero(excess > 0))
    if not wrong:
        return None
    worst = tuple(map(int, np.unravel_index(int(np.argmax(excess)), excess.shape)))
    place = f"at {list(worst)}: " if worst else ""
    return (
        f"{_type(dtype, want.shape)}, {wrong} of {want.size} elements, worst {place}"
        f"actual {got[worst]}, expected {want[worst]} ({how})"
    )


def _type(dtype: np.dtype, shape: tuple[int, ...]) -> str:
    return f"{dtype}[{','.join(map(str, shape))}]"
