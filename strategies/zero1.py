"""Every axis splits the batch and the optimizer's state (ZeRO stage 1; Rajbhandari et al., SC 2020).

Parameters and gradients are whole. Each device updates its piece of the parameters, which are then gathered. Where
nothing but the update reads a gradient, the compiler makes a reduce-scatter of its all-reduce, as in stage 2.
"""

from ffjax.strategies.base import Role, Strategy, register

STRATEGY = register(Strategy(name="zero1", roles=lambda mesh: (Role.ZERO1,) * len(mesh.axes), doc=__doc__ or ""))
