"""Every axis splits the batch; gradients are all-reduced, state is whole on every device."""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(
    Strategy(
        name="data_parallel",
        roles=lambda mesh: (Role.DATA,) * len(mesh.axes),
        doc=__doc__ or "",
    )
)
