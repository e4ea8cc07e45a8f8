"""A residual convolutional net in Flax NNX, trained on scikit-learn's handwritten digits.

    python examples/convnet.py --steps 100
    python examples/convnet.py --steps 100 --autoshard

An ordinary single-device program in the NNX way: the step mutates the model and its optimizer. The only line
that knows of other devices is the `autoshard` in `main`.
"""

import argparse
import functools
import time
from dataclasses import dataclass

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx
from sklearn.datasets import load_digits

IMAGE_SHAPE = (8, 8, 1)  # height, width, channels
CLASSES = 10
TEST_IMAGES = 360  # the last fifth of the 1797


@dataclass(frozen=True, kw_only=True)
class Config:
    """Sizes of the model and of its run."""

    widths: tuple[int, ...] = (128, 256, 512)  # channels of each stage; each stage after the first halves the image
    blocks: int = 3  # residual blocks in a stage
    batch: int = 256
    dropout: float = 0.1
    learning_rate: float = 0.05
    momentum: float = 0.9
    decay_steps: int = 1_000

    @classmethod
    def tiny(cls) -> "Config":
        return cls(widths=(16, 32), blocks=1, batch=16)

    @classmethod
    def small(cls) -> "Config":
        return cls(widths=(32, 64), blocks=2, batch=64)


class Block(nnx.Module):
    """Two convolutions with a shortcut around them (ResNet, section 3.3)."""

    def __init__(self, channels_in: int, channels: int, stride: int, *, rngs: nnx.Rngs):
        conv = functools.partial(nnx.Conv, kernel_size=(3, 3), use_bias=False, rngs=rngs)
        self.conv1 = conv(channels_in, channels, strides=stride)
        self.norm1 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.conv2 = conv(channels, channels)
        self.norm2 = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        self.shortcut = nnx.data(None)  # nnx.data: the attribute may hold a module
        if stride != 1 or channels_in != channels:
            self.shortcut = conv(channels_in, channels, kernel_size=(1, 1), strides=stride)

    def __call__(self, x: jax.Array) -> jax.Array:
        h = nnx.relu(self.norm1(self.conv1(x)))
        h = self.norm2(self.conv2(h))
        return nnx.relu(h + (x if self.shortcut is None else self.shortcut(x)))


class ConvNet(nnx.Module):
    """Images [batch, 8, 8, 1] to logits [batch, 10]."""

    def __init__(self, config: Config, *, rngs: nnx.Rngs):
        channels = config.widths[0]
        self.stem = nnx.Conv(IMAGE_SHAPE[-1], channels, (3, 3), use_bias=False, rngs=rngs)
        self.norm = nnx.BatchNorm(channels, momentum=0.9, rngs=rngs)
        blocks = []
        for stage, width in enumerate(config.widths):
            for i in range(config.blocks):
                stride = 2 if stage > 0 and i == 0 else 1
                blocks.append(Block(channels, width, stride, rngs=rngs))
                channels = width
        self.blocks = nnx.List(blocks)
        self.dropout = nnx.Dropout(config.dropout, rngs=rngs)
        self.head = nnx.Linear(channels, CLASSES, rngs=rngs)

    def __call__(self, images: jax.Array) -> jax.Array:
        x = nnx.relu(self.norm(self.stem(images)))
        for block in self.blocks:
            x = block(x)
        return self.head(self.dropout(x.mean(axis=(1, 2))))


# Cached because nnx.Optimizer carries it as a static attribute, which nnx.jit compares by identity.
@functools.cache
def make_optimizer(config: Config) -> optax.GradientTransformation:
    schedule = optax.cosine_decay_schedule(config.learning_rate, config.decay_steps)
    return optax.sgd(schedule, momentum=config.momentum, nesterov=True)


def init(config: Config, key: jax.Array) -> tuple[ConvNet, nnx.Optimizer]:
    model = ConvNet(config, rngs=nnx.Rngs(key))
    return model, nnx.Optimizer(model, make_optimizer(config), wrt=nnx.Param)


def train_step(model: ConvNet, optimizer: nnx.Optimizer, batch: dict[str, jax.Array]) -> dict[str, jax.Array]:
    """Updates the model (parameters, batch statistics, dropout counter) and the optimizer in place."""

    def loss_fn(model: ConvNet):
        logits = model(batch["images"])
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch["labels"]).mean(), logits

    (loss, logits), grads = nnx.value_and_grad(loss_fn, has_aux=True)(model)
    optimizer.update(model, grads)
    return {"loss": loss, "accuracy": (logits.argmax(-1) == batch["labels"]).mean()}


def make_train_step(config: Config):
    """The same function for every configuration: the sizes are all in the model."""
    del config
    return train_step


def example_args(config: Config) -> tuple[ConvNet, nnx.Optimizer, dict[str, jax.ShapeDtypeStruct]]:
    """The shapes of the step's arguments, with nothing allocated."""
    model, optimizer = nnx.eval_shape(lambda: init(config, jax.random.key(0)))
    images = jax.ShapeDtypeStruct((config.batch, *IMAGE_SHAPE), jnp.float32)
    return model, optimizer, {"images": images, "labels": jax.ShapeDtypeStruct((config.batch,), jnp.int32)}


@functools.cache
def read_digits() -> tuple[np.ndarray, np.ndarray]:
    """All images, [1797, 8, 8, 1] in [0, 1], and their labels."""
    digits = load_digits()
    return (digits.images[..., None] / 16).astype(np.float32), digits.target.astype(np.int32)


def batches(config: Config, seed: int = 0):
    """Endless batches of the training images, shuffled anew in each epoch."""
    images, labels = read_digits()
    rng = np.random.default_rng(seed)
    while True:
        order = rng.permutation(len(images) - TEST_IMAGES)
        for start in range(0, len(order) - config.batch + 1, config.batch):
            chosen = order[start : start + config.batch]
            yield {"images": images[chosen], "labels": labels[chosen]}


def held_out_accuracy(model: ConvNet) -> float:
    """The share of the held-out images that the model reads rightly."""
    images, labels = (array[-TEST_IMAGES:] for array in read_digits())
    model.eval()  # running averages in place of the batch's own, and no dropout
    logits = nnx.jit(lambda model, images: model(images))(model, images)
    model.train()
    return float((np.asarray(logits).argmax(-1) == labels).mean())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", choices=["tiny", "small", "full"], default="small")
    parser.add_argument("--steps", type=int, default=100)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--autoshard", action="store_true", help="run on every visible device, as ffjax finds best")
    args = parser.parse_args()

    config = Config() if args.config == "full" else getattr(Config, args.config)()
    if args.autoshard:
        import ffjax

        step = ffjax.autoshard(train_step, donate_argnums=(0, 1))
    else:
        step = nnx.jit(train_step, donate_argnums=(0, 1))

    model, optimizer = init(config, jax.random.key(args.seed))
    start = time.perf_counter()
    for i, batch in zip(range(1, args.steps + 1), batches(config, args.seed), strict=False):
        metrics = step(model, optimizer, batch)
        if i == 1 or i % 10 == 0 or i == args.steps:
            print(f"step {i:5d}  loss {metrics['loss']:.4f}  {time.perf_counter() - start:.1f} s")
    print(f"accuracy on {TEST_IMAGES} held-out images: {held_out_accuracy(model):.3f}")


if __name__ == "__main__":
    main()
