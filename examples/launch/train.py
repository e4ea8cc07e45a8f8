"""Trains a small network in as many processes as it is started in; the losses are the same in any number.

    python examples/launch/train.py
    ffjax launch --processes 2 --devices-per-process 2 --cpu examples/launch/train.py
    srun ffjax launch --detect examples/launch/train.py

Nothing in it is about processes but the loading: each makes only the rows of the batch that its own devices hold.
"""

import argparse
import time

import jax
import jax.numpy as jnp
import numpy as np

import ffjax

FEATURES, HIDDEN, CLASSES = 64, 256, 16


def init(key: jax.Array):
    """Kernels [fan_in, fan_out] and a momentum of each."""
    sizes = [(FEATURES, HIDDEN), (HIDDEN, HIDDEN), (HIDDEN, CLASSES)]
    keys = jax.random.split(key, len(sizes))
    kernels = [jax.random.normal(k, s) / np.sqrt(s[0]) for k, s in zip(keys, sizes, strict=True)]
    return {"kernels": kernels, "momentum": [jnp.zeros(s) for s in sizes]}


def train_step(state, batch):
    """One step of gradient descent with momentum: (state, batch) -> (state, loss)."""

    def loss_fn(kernels):
        x = batch["x"]
        for kernel in kernels[:-1]:
            x = jax.nn.relu(x @ kernel)
        logits = x @ kernels[-1]
        return -jnp.take_along_axis(jax.nn.log_softmax(logits), batch["y"][:, None], axis=1).mean()

    loss, grads = jax.value_and_grad(loss_fn)(state["kernels"])
    momentum = jax.tree.map(lambda m, g: 0.9 * m + g, state["momentum"], grads)
    kernels = jax.tree.map(lambda k, m: k - 0.1 * m, state["kernels"], momentum)
    return {"kernels": kernels, "momentum": momentum}, loss


def rows(step: int, which: np.ndarray) -> dict[str, np.ndarray]:
    """Some rows of the batch of one step, each made from its own number: any process can make any of them."""
    x = np.stack([np.random.default_rng((step, row)).normal(size=FEATURES) for row in which]).astype(np.float32)
    return {"x": x, "y": x[:, :CLASSES].argmax(axis=1).astype(np.int32)}


def own_rows(leaf: jax.ShapeDtypeStruct) -> np.ndarray:
    """Numbers of the rows that the devices of this process hold."""
    pieces = leaf.sharding.addressable_devices_indices_map(leaf.shape).values()
    return np.unique(np.concatenate([np.arange(leaf.shape[0])[index[0]] for index in pieces]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--batch", type=int, default=64, help="rows of the whole batch")
    parser.add_argument("--strategy", default="auto")
    parser.add_argument("--cache", help="a folder of plans that all processes see")
    args = parser.parse_args()

    step = ffjax.autoshard(train_step, strategy=args.strategy, cache=args.cache, donate_argnums=0)
    key = jax.random.key(0)
    shapes = {
        "x": jax.ShapeDtypeStruct((args.batch, FEATURES), jnp.float32),
        "y": jax.ShapeDtypeStruct((args.batch,), jnp.int32),
    }
    plan = step.plan(jax.eval_shape(init, key), shapes)
    first = jax.process_index() == 0
    if first:
        print(f"{jax.process_count()} processes, {jax.device_count()} devices, mesh {plan.mesh_shape}")
    state = step.init(init, key)
    own = {name: own_rows(leaf) for name, leaf in step.abstract_state(shapes, "batch").items()}
    began = time.perf_counter()
    for i in range(args.steps):
        batch = step.place_batch({name: rows(i, own[name])[name] for name in shapes})
        state, loss = step(state, batch)
        if first:
            print(f"step {i + 1:4d}  loss {float(loss):.6f}  {time.perf_counter() - began:.1f} s")


if __name__ == "__main__":
    main()
