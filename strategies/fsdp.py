"""Every axis splits the batch and the state (ZeRO-3; Rajbhandari et al., SC 2020)."""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(
    Strategy(
        name="fsdp",
        roles=lambda mesh: (Role.FSDP,) * len(mesh.axes),
        doc=__doc__ or "",
    )
)
