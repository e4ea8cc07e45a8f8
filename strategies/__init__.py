"""Candidates, named strategies and search. Importing this package registers the named strategies."""

from ffjax.strategies import data_parallel, fsdp, fsdp_tensor_parallel, tensor_parallel
from ffjax.strategies.base import Role, Strategy, all_strategies, named, register

__all__ = [
    "Role",
    "Strategy",
    "all_strategies",
    "data_parallel",
    "fsdp",
    "fsdp_tensor_parallel",
    "named",
    "register",
    "tensor_parallel",
]
