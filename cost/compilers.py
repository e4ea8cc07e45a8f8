"""What a platform's compiler does to a program that decides what is in memory when.

Each field is a behaviour that was seen in XLA's buffer assignments (`--xla_dump_to`, jax 0.10.2); the shares are
measured by `benchmarks/memory.py`.
"""

from __future__ import annotations

from dataclasses import dataclass

from ffjax.cost.hardware import Platform


@dataclass(frozen=True, slots=True, kw_only=True)
class Compiler:
    """How one compiler schedules, fuses and allocates. The defaults follow the program to the letter."""

    runs_late: bool = False
    """Ops run as late as their readers allow (`ffjax.cost.latency_hiding`), rather than in the order of the program."""
    runs_early: bool = False
    """Ops run as soon as what they read is there, in the order of how many come before (`ffjax.cost.breadth_first`)."""
    merges_remat: bool = False
    """Recomputation outside of loops is merged with the original: the barrier is dropped before common subexpressions
    are eliminated."""
    keeps_expensive: bool = False
    """A transcendental that several kernels read, one of which reduces, is stored, not computed again in each."""
    keeps_shared: bool = False
    """Nothing is computed twice: whatever several kernels read is stored, broadcasts included."""
    copies_transposed: bool = False
    """A transposed operand is copied into the layout that its reader wants."""
    fuses_into_dots: bool = False
    """Dots compute cheap elementwise operands themselves (Triton's GEMM fusions)."""
    widens_halves: bool = False
    """Arithmetic on bfloat16 and float16 is done, and what it makes is kept, in float32."""
    reduces_out_of_place: bool = False
    """An all-reduce leaves its operand where it is: both are in memory."""
    slices_reductions: bool = False
    """There is no reduce-scatter: sums are all-reduced whole, then sliced."""
    copies_gathered: bool = False
    """What is gathered along an inner dimension comes out transposed and is copied."""
    fuses_gathers: bool = False
    """A gather that one elementwise kernel reads is part of that."""
    writes_over: bool = False
    """An elementwise kernel writes over an operand of its size that it is the last to read."""
    copies_updated: bool = False
    """A donated argument whose update transposes is copied before it is read for the first time."""
    broadcasts_for_sums: bool = False
    """Sums of products are a library's, which takes whole arrays: what is broadcast for one is stored broadcast."""
    pads_convolutions: bool = False
    """A convolution reads a padded copy of an image that it pads more on one side than on the other."""
    combined_bytes: float = 0.0
    """Sums are combined up to so many bytes of results; all of what they reduce waits for the last."""
    combines_all_sums: bool = False
    """Sums are combined however large they are."""
    combines_gathers: bool = False
    """Gathers are combined likewise."""
    combines_apart: bool = False
    """What waits for nothing, or nothing but the optimizer waits for, is not combined with what is on the way."""
    fragmentation: float = 0.0
    """Bytes lost between temporaries, as a share of them."""
    results_apart: bool = False
    """A result that replaces no argument has memory of its own from the start; until it is there, temporaries that are
    no larger use that, one at a time."""


XLA_CPU = Compiler(
    runs_early=True,
    merges_remat=True,
    keeps_expensive=True,
    keeps_shared=True,
    copies_transposed=True,
    widens_halves=True,
    reduces_out_of_place=True,
    slices_reductions=True,
    copies_gathered=True,
    broadcasts_for_sums=True,
    combines_all_sums=True,
    fragmentation=0.02,
    results_apart=True,
)
XLA_GPU = Compiler(
    runs_late=True,
    keeps_expensive=True,
    fuses_into_dots=True,
    reduces_out_of_place=True,
    fuses_gathers=True,
    writes_over=True,
    copies_updated=True,
    pads_convolutions=True,
    combined_bytes=30 * 2**20,  # xla_gpu_all_gather_, all_reduce_ and reduce_scatter_combine_threshold_bytes
    combines_gathers=True,
    combines_apart=True,
    fragmentation=0.02,
    results_apart=True,
)
TO_THE_LETTER = Compiler()


def compiler_of(platform: Platform) -> Compiler:
    """The compiler of a platform; one that follows the program to the letter where none was studied (TPU)."""
    return {"cpu": XLA_CPU, "gpu": XLA_GPU}.get(platform, TO_THE_LETTER)
