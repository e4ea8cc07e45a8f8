"""The last mesh axis is tensor and sequence parallel, the others are FSDP."""

from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, register


def _roles(mesh: MeshShape) -> tuple[Role, ...] | None:
    return (Role.FSDP,) * (len(mesh.axes) - 1) + (Role.SEQUENCE,) if len(mesh.axes) > 1 else None


STRATEGY = register(Strategy(name="fsdp+tensor_parallel+sequence", roles=_roles, doc=__doc__ or ""))
