"""Where compiled programs come from: a `jax.stages.Compiled`, HLO text, or a serialized `HloModuleProto`."""

from __future__ import annotations

from typing import TYPE_CHECKING, TypeAlias

from ffjax.cost.hlo.module import Module, parse_module
from ffjax.errors import HloError
from ffjax.ir import compat

if TYPE_CHECKING:
    import jax

HloSource: TypeAlias = "Module | jax.stages.Compiled | str | bytes"


def read_module(source: HloSource) -> Module:
    """A module from a compiled program, its HLO text, or a serialized `HloModuleProto`; raises HloError.

    A program that was only lowered has no HLO yet: compile it first.
    """
    match source:
        case Module():
            return source
        case str():
            return parse_module(source)
        case bytes():
            try:
                text = compat.hlo_text(source)
            except Exception as error:  # the error's type is jaxlib's own affair
                raise HloError(
                    f"these {len(source)} bytes are no serialized HloModuleProto: {error}; pass the proto of one "
                    "module, or its text"
                ) from error
            if text is None:
                raise HloError("this jaxlib cannot read a serialized HloModuleProto; pass the module's text instead")
            return parse_module(text)
    if not hasattr(source, "memory_analysis"):
        raise HloError(
            f"{type(source).__name__} has no compiled module; pass compiled = lowered.compile(), its text, or a proto"
        )
    text = source.as_text()
    if text is None:
        raise HloError(f"{source} has no HLO text; this backend does not give it: pass the text of a dump")
    return parse_module(text)
