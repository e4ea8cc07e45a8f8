"""The last mesh axis splits experts, all axes split the batch, the others are FSDP (GShard, arXiv 2006.16668).

Tokens go to their experts by all-to-all; the weights of experts stay where they are.
"""

from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, register


def _roles(mesh: MeshShape) -> tuple[Role, ...]:
    return (Role.FSDP,) * (len(mesh.axes) - 1) + (Role.EXPERT,)


STRATEGY = register(Strategy(name="expert_parallel", roles=_roles, doc=__doc__ or ""))
