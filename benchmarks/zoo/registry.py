"""The models of the zoo by name, each with what was published of it."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import optax

from zoo import conformer, decoder, dlrm, experts, inception, mamba, meshgraph, nmt, resnets, t5, unet, vit
from zoo.model import Model, trained

Optimizer = Callable[[float], optax.GradientTransformation]
"""From the epsilon that it divides by to an optimizer."""


def adamw(eps: float) -> optax.GradientTransformation:
    return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(3e-4, b2=0.95, eps=eps, weight_decay=0.1))


def adafactor(eps: float) -> optax.GradientTransformation:
    return optax.adafactor(1e-3, min_dim_size_to_factor=8, eps=eps**2)


def momentum(eps: float) -> optax.GradientTransformation:
    return optax.sgd(0.1, momentum=0.9)


def sgd(eps: float) -> optax.GradientTransformation:
    return optax.sgd(0.1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Entry:
    """One model. `make` is its module's function from a configuration and a batch to the parts of `trained`."""

    config: Any
    tiny: Any
    per_device: int
    """Examples that a device of 80 GB gets, in weak scaling; smaller ones get a share of it, one at least."""
    make: Callable[[Any, int], Any] | None
    """None for the one that brings its own step."""
    optimizer: Optimizer = adamw
    published: float | None = None
    """How many parameters the source says; None where it does not."""
    dense: bool = False
    """A plain transformer, where experts' strategies leave little room."""


_DECODER = {"make": decoder.make, "dense": True, "per_device": 1}
_RESNET = {"make": resnets.make, "optimizer": momentum}

ZOO: dict[str, Entry] = {
    "gpt3_175b": Entry(config=decoder.GPT3_175B, tiny=decoder.TINY_GPT, published=175e9, **_DECODER),
    "llama3_8b": Entry(config=decoder.LLAMA3_8B, tiny=decoder.TINY_LLAMA, published=8.03e9, **_DECODER),
    "llama3_70b": Entry(config=decoder.LLAMA3_70B, tiny=decoder.TINY_LLAMA, published=70.6e9, **_DECODER),
    "mixtral_8x7b": Entry(
        config=experts.MIXTRAL_8X7B, tiny=experts.TINY_MIXTRAL, per_device=1, make=experts.make, published=46.7e9
    ),
    "deepseek_moe_16b": Entry(
        config=experts.DEEPSEEK_16B, tiny=experts.TINY_DEEPSEEK, per_device=1, make=experts.make, published=16.4e9
    ),
    "t5_11b": Entry(
        config=t5.T5_11B, tiny=t5.TINY, per_device=4, make=t5.make, optimizer=adafactor, published=11.3e9, dense=True
    ),
    "vit_h14": Entry(config=vit.VIT_H14, tiny=vit.TINY, per_device=64, make=vit.make, published=632e6, dense=True),
    "wide_resnet_2b": Entry(
        config=resnets.WIDE_RESNET_2B, tiny=resnets.TINY_WIDE, per_device=8, published=2e9, **_RESNET
    ),
    "wide_resnet_13b": Entry(
        config=resnets.WIDE_RESNET_13B, tiny=resnets.TINY_WIDE, per_device=4, published=13e9, **_RESNET
    ),
    "inception_v3": Entry(
        config=inception.INCEPTION_V3,
        tiny=inception.TINY,
        per_device=64,
        make=inception.make,
        optimizer=momentum,
        published=23.8e6,
    ),
    "resnext_50": Entry(config=resnets.RESNEXT_50, tiny=resnets.TINY_NEXT, per_device=64, published=25.0e6, **_RESNET),
    "dlrm_mlperf": Entry(
        config=dlrm.MLPERF, tiny=dlrm.TINY, per_device=2048, make=None, optimizer=sgd, published=24.0e9
    ),
    "unet_sd1": Entry(config=unet.STABLE_DIFFUSION, tiny=unet.TINY, per_device=8, make=unet.make, published=860e6),
    "mamba_2_8b": Entry(config=mamba.MAMBA_2_8B, tiny=mamba.TINY, per_device=1, make=mamba.make, published=2.77e9),
    "nmt_lstm": Entry(config=nmt.FLEXFLOW_NMT, tiny=nmt.TINY, per_device=64, make=nmt.make, optimizer=sgd),
    "mesh_graph_net": Entry(config=meshgraph.CYLINDER_FLOW, tiny=meshgraph.TINY, per_device=32, make=meshgraph.make),
    "conformer_l": Entry(
        config=conformer.CONFORMER_L, tiny=conformer.TINY, per_device=16, make=conformer.make, published=121e6
    ),
}


def build(name: str, batch: int, *, tiny: bool = False, **changes: Any) -> Model:
    """A model of the zoo.

    Args:
      name: a key of `ZOO`.
      batch: examples of the whole step.
      tiny: of a size that runs on a CPU. Its optimizer divides by no less than 1e-3, as the rounding of gradients that
        are nearly zero would otherwise become steps of full size.
      changes: other fields of its configuration, such as `layers`, `scanned`, `remat` or `dtype`.

    Raises ValueError for an unknown name or a field that the model does not have.
    """
    if name not in ZOO:
        raise ValueError(f"there is no model {name!r}; the zoo has {', '.join(ZOO)}")
    entry = ZOO[name]
    config = entry.tiny if tiny else entry.config
    if unknown := changes.keys() - {field.name for field in dataclasses.fields(config)}:
        raise ValueError(f"{name} has no {', '.join(sorted(unknown))} to change; it has {config}")
    config = dataclasses.replace(config, **changes)
    if entry.make is None:
        return dlrm.model(config, batch)
    module, shapes, limits = entry.make(config, batch)
    return trained(module, shapes, entry.optimizer(1e-3 if tiny else 1e-8), limits)
