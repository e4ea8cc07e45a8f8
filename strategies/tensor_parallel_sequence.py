"""Every axis is tensor parallel where weights are at work and sequence parallel elsewhere.

What tensor parallelism keeps whole between its products (norms, dropout, residuals) is split along the sequence:
each all-reduce becomes a reduce-scatter and an all-gather (Korthikanti et al., MLSys 2023).
"""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(
    Strategy(
        name="tensor_parallel+sequence",
        roles=lambda mesh: (Role.SEQUENCE,) * len(mesh.axes),
        doc=__doc__ or "",
    )
)
