"""Every axis splits the batch, gradients and the optimizer's state (ZeRO stage 2; Rajbhandari et al., SC 2020)."""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(Strategy(name="zero2", roles=lambda mesh: (Role.ZERO2,) * len(mesh.axes), doc=__doc__ or ""))
