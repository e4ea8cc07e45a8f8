"""Every axis splits weights and what they compute; the batch is whole (Megatron-LM, arXiv 1909.08053)."""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(
    Strategy(
        name="tensor_parallel",
        roles=lambda mesh: (Role.TENSOR,) * len(mesh.axes),
        doc=__doc__ or "",
    )
)
