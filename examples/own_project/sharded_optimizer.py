"""A strategy of our own: tensor parallelism over the last mesh axis, a sharded optimizer over the others.

Megatron-LM's `--use-distributed-optimizer`. Importing this file is all it takes: from then on the strategy competes in
every search, and `strategy="zero1+tensor_parallel"` asks for it alone.
"""

from ffjax.strategies import MeshShape, Role, Strategy, register


def roles(mesh: MeshShape) -> tuple[Role, ...] | None:
    if len(mesh.axes) < 2:
        return None  # of no use where there is one axis: ffjax has `zero1` and `tensor_parallel` for that
    return (Role.ZERO1,) * (len(mesh.axes) - 1) + (Role.TENSOR,)


STRATEGY = register(Strategy(name="zero1+tensor_parallel", roles=roles))
