"""Plans to move states between, and states bit by bit."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

PLANS: dict[str, dict[str, Any]] = {
    "data_parallel": {"strategy": "data_parallel", "mesh": {"x": 8}},
    "fsdp": {"strategy": "fsdp", "mesh": {"x": 8}},
    "both": {"strategy": "fsdp+tensor_parallel", "mesh": {"x": 4, "y": 2}},
    "four devices": {"strategy": "fsdp", "devices": jax.devices()[2:6]},
}


def bits(tree: Any) -> list[Any]:
    """The leaves as bytes, with their dtypes."""
    words = [
        jax.random.key_data(v) if jnp.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in jax.tree.leaves(tree)
    ]
    return [(str(v.dtype), v.shape, np.asarray(v).tobytes()) for v in words]
