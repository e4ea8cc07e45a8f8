"""A state trained under one plan goes on under three others, by checkpoints and live, and onto one device: bit for bit.

python benchmarks/checkpoint.py
"""

from __future__ import annotations

import tempfile
from pathlib import Path

import jax
import numpy as np
from tables import write

import ffjax
from ffjax import checkpoint, nnx
from ffjax.examples import convnet, gpt, moe
from ffjax.testing import fake_devices

PLANS = {
    "data_parallel 8": {"strategy": "data_parallel", "mesh": {"x": 8}},
    "fsdp 8": {"strategy": "fsdp", "mesh": {"x": 8}},
    "fsdp+tensor_parallel 4x2": {"strategy": "fsdp+tensor_parallel", "mesh": {"x": 4, "y": 2}},
    "found, on 4 of the devices": {"devices": slice(4, 8)},
}
EXAMPLES = {
    "gpt (linen, adamw, dropout key)": (gpt, gpt.Config.tiny()),
    "moe (plain pytrees, adamw)": (moe, moe.Config.tiny()),
    "convnet (NNX, batch norm, sgd)": (convnet, convnet.Config.tiny()),
}
NOTES = (
    "Each row takes the state of the row above (the first one: of a step under its plan), by Orbax (`checkpoint.save`, "
    "`checkpoint.restore`) and by `place_state` of the live state, and counts the bits in which either differs from "
    "the state before the first move. `wrong` counts the arrays that are not sharded as the plan says.",
    "`held` is what one device has of the state at most; `fetched` is the largest array that came to the host whole "
    "while the live state moved, as a share of the largest array of the state.",
)


def arrays_of(state):
    """Leaves as arrays of numbers; NNX objects and typed keys opened up."""
    leaves = jax.tree.leaves(nnx.as_arrays(state)[0])
    return [jax.random.key_data(v) if jax.numpy.issubdtype(v.dtype, jax.dtypes.prng_key) else v for v in leaves]


def copied(state):
    return [np.array(array) for array in arrays_of(state)]


def differing_bits(state, wanted) -> int:
    got = copied(state)
    assert [(a.shape, a.dtype) for a in got] == [(a.shape, a.dtype) for a in wanted]
    pairs = zip(got, wanted, strict=True)
    return sum(
        int(np.bitwise_count(a.reshape(-1).view(np.uint8) ^ b.reshape(-1).view(np.uint8)).sum()) for a, b in pairs
    )


class Fetched:
    """The sizes of arrays that are brought to the host whole."""

    def __init__(self) -> None:
        self.sizes = [0]
        self.array = type(jax.numpy.ones(1))
        self.value = self.array._value

    def __enter__(self):
        self.array._value = property(lambda array: self.sizes.append(array.size) or self.value.fget(array))
        return self.sizes

    def __exit__(self, *_):
        self.array._value = self.value


def rows_of(name: str, module, config, folder: Path):
    devices = jax.devices()
    step, batch = module.make_train_step(config), next(module.batches(config))

    def fresh():
        made = module.init(config, jax.random.key(0))
        return made if isinstance(made, tuple) else (made,)

    steps = {}
    for label, options in PLANS.items():
        chosen = devices[options["devices"]] if "devices" in options else None
        steps[label] = ffjax.autoshard(step, **{**options, "devices": chosen})
        steps[label].plan(*fresh(), batch)
    first = next(iter(steps.values()))
    state = fresh()
    if module is convnet:
        first(*state, batch)
    else:
        state = (first(*state, batch)[0],)
    wanted, whole = copied(state), sum(a.nbytes for a in arrays_of(state))
    rows, live, previous = [], state, ""
    for turn, (label, sharded) in enumerate([*steps.items(), ("one device", None)]):
        if turn:
            target = sharded.abstract_state(state) if sharded else checkpoint.on_device(state)
            state = checkpoint.restore(folder / str(turn - 1), target)
            with Fetched() as sizes:
                if sharded:
                    # NNX objects are updated in place, so a copy of their arrays is moved.
                    live = sharded.place_state(nnx.as_arrays(live)[0])
            largest = max(sizes) / max(a.size for a in wanted)
            described = jax.tree.leaves(target)
            wrong = sum(a.sharding != d.sharding for a, d in zip(jax.tree.leaves(state), described, strict=True))
            held = {}
            for array in arrays_of(state):
                for shard in array.addressable_shards:
                    held[shard.device] = held.get(shard.device, 0) + shard.data.nbytes
            moved = [differing_bits(live, wanted), f"{largest:.0%}"] if sharded else ["-", "-"]
            share = f"{max(held.values()) / whole:.0%}"
            rows.append(
                (
                    name,
                    previous,
                    label,
                    len(wanted),
                    f"{whole:,}",
                    differing_bits(state, wanted),
                    moved[0],
                    wrong,
                    share,
                    moved[1],
                )
            )
        checkpoint.save(folder / str(turn), state)
        previous = label
    return rows


def main() -> None:
    fake_devices(8)
    rows = []
    for name, (module, config) in EXAMPLES.items():
        with tempfile.TemporaryDirectory() as folder:
            rows += rows_of(name, module, config, Path(folder))
    header = ["state", "from", "to", "arrays", "bytes", "bits differ, Orbax", "live", "wrong", "held", "fetched"]
    write("checkpoint", "A state across plans", NOTES, header, rows)


if __name__ == "__main__":
    main()
