"""The last mesh axis splits the height or width of images, the others split the batch; state is whole.

Where a window slides over an image, devices exchange the edges of their pieces (Jia et al., ICML 2018; Dryden et al.,
IPDPS 2019). For images too large, or batches too small, to split the batch alone.
"""

from ffjax.ir.spec import MeshShape
from ffjax.strategies.base import Role, Strategy, register


def _roles(mesh: MeshShape) -> tuple[Role, ...]:
    return (Role.DATA,) * (len(mesh.axes) - 1) + (Role.SPATIAL,)


STRATEGY = register(Strategy(name="spatial", roles=_roles, doc=__doc__ or ""))
