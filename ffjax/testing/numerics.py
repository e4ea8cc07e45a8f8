"""Same numerics: two pytrees compared leaf by leaf, each within the tolerance of its dtype."""

from __future__ import annotations

from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike

_MAX_SHOWN = 10  # leaves in one message; the rest are only counted


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
