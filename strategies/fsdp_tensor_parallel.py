"""The last mesh axis is tensor parallel, the others are FSDP (2D parallelism, the usual choice for large models)."""

from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, register


def _roles(mesh: MeshShape) -> tuple[Role, ...] | None:
    return (Role.FSDP,) * (len(mesh.axes) - 1) + (Role.TENSOR,) if len(mesh.axes) > 1 else None


STRATEGY = register(Strategy(name="fsdp+tensor_parallel", roles=_roles, doc=__doc__ or ""))
