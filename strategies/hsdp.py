"""The last mesh axis is FSDP, the others replicate: state is sharded within a host and whole across hosts.

Hybrid sharding (PyTorch FSDP; Zhao et al., VLDB 2023): weights are gathered over fast links only, and gradients are
reduce-scattered there and all-reduced across.
"""

from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, register


def _roles(mesh: MeshShape) -> tuple[Role, ...] | None:
    return (Role.DATA,) * (len(mesh.axes) - 1) + (Role.FSDP,) if len(mesh.axes) > 1 else None


STRATEGY = register(Strategy(name="hsdp", roles=_roles, doc=__doc__ or ""))
