"""Candidates, named strategies and search. Importing this package registers the named strategies."""

from ffjax.ir.spec import MeshShape
from ffjax.strategies import (
    data_parallel,
    expert_parallel,
    fsdp,
    fsdp_tensor_parallel,
    fsdp_tensor_parallel_sequence,
    hsdp,
    spatial,
    tensor_parallel,
    tensor_parallel_sequence,
    zero1,
    zero2,
)
from ffjax.strategies.base import Role, Strategy, all_strategies, named, register, unregister

__all__ = [
    "MeshShape",
    "Role",
    "Strategy",
    "all_strategies",
    "data_parallel",
    "expert_parallel",
    "fsdp",
    "fsdp_tensor_parallel",
    "fsdp_tensor_parallel_sequence",
    "hsdp",
    "named",
    "register",
    "spatial",
    "tensor_parallel",
    "tensor_parallel_sequence",
    "unregister",
    "zero1",
    "zero2",
]
