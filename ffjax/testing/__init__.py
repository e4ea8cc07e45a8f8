"""For tests of sharded steps on a laptop: fake devices, and assertions on numerics, collectives, memory and plans.

A test suite asks for fake devices in its pytest configuration (`ffjax_devices = 8`, see `pytest_ffjax`), or calls
`fake_devices(8)` before JAX runs anything. `docs/testing.md` shows all of it.

>>> import ffjax, jax.numpy as jnp
>>> def step(w, x):
...     return w - 0.1 * x.T @ (x @ w), jnp.sum(w)
>>> w, x = jnp.ones((16, 4)), jnp.ones((32, 16)) / 16
>>> sharded = ffjax.autoshard(step, strategy="data_parallel")
>>> assert_same_numerics(sharded(w, x), step(w, x))
>>> assert_collectives(sharded.plan(w, x), {"all_reduce": 16 * 4 * 4})
>>> plan = assert_fits(sharded, w, x, memory="1MiB")
"""

from ffjax.testing.devices import fake_devices
from ffjax.testing.golden import assert_plan_matches, plan_text
from ffjax.testing.numerics import Tolerance, assert_same_numerics, tolerance_of
from ffjax.testing.plans import assert_collectives, assert_fits

__all__ = [
    "Tolerance",
    "assert_collectives",
    "assert_fits",
    "assert_plan_matches",
    "assert_same_numerics",
    "fake_devices",
    "plan_text",
    "tolerance_of",
]
