"""The cases of the memory benchmark and of its gate: models, meshes, strategies, and how a plan is kept in a line."""

from __future__ import annotations

import dataclasses
import functools
import importlib
from collections.abc import Callable
from dataclasses import dataclass

from ffjax.cost.cluster import Platform
from ffjax.cost.compilers import compiler_of
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.ir.assignment import UNUSED, Assignment
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, find_regions
from ffjax.ir.spec import MeshShape
from ffjax.planner import trace_step
from ffjax.strategies.families import family_keys, members

MESHES = ({"x": 8}, {"x": 4, "y": 2})
STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")
GPT = {"layers": 2, "d_model": 1024, "seq_len": 512, "batch": 64}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt": ("gpt", GPT),
    "gpt remat": ("gpt", GPT | {"remat": True}),
    "gpt scanned": ("gpt", GPT | {"scan_layers": True, "layers": 6}),
    "gpt scanned remat": ("gpt", GPT | {"scan_layers": True, "remat": True, "layers": 6}),
    "gpt bfloat16": ("gpt", GPT | {"dtype": "bfloat16", "scan_layers": True, "remat": True, "layers": 6, "vocab": 8192}),
    "convnet": ("convnet", {"widths": (128, 256), "batch": 4096}),
    "recommender": ("recommender", {"rows": (800_000, 160_000, 8_000, 512, 128, 32, 24), "width": 64, "batch": 32_768,
                                    "bottom": (512, 256), "top": (1024, 1024, 512)}),
    "moe": ("moe", {"d_model": 512, "d_expert": 2048, "vocab": 1024, "seq_len": 256, "batch": 64}),
}  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    mesh: dict[str, int]
    strategy: str
    donated: bool

    @property
    def mesh_text(self) -> str:
        return "x".join(map(str, self.mesh.values()))

    @property
    def key(self) -> str:
        return ", ".join((self.model, self.mesh_text, self.strategy, "donated" if self.donated else "kept"))

    @classmethod
    def parse(cls, key: str) -> Case:
        model, mesh, strategy, donated = key.split(", ")
        sizes = dict(zip("xyz", map(int, mesh.split("x")), strict=False))
        return cls(model=model, mesh=sizes, strategy=strategy, donated=donated == "donated")


def build(model: str, donated: bool) -> tuple[Callable[..., object], tuple[object, ...], tuple[int, ...]]:
    """The step of a model, its arguments' shapes, and which of them are donated."""
    example, options = MODELS[model]
    module = importlib.import_module(f"ffjax.examples.{example}")
    config = dataclasses.replace(module.Config.small(), **options)
    donate = () if not donated else (0, 1) if example == "convnet" else (0,)
    return module.make_train_step(config), module.example_args(config), donate


@functools.cache
def regions_of(model: str, donated: bool) -> Regions:
    step, args, donate = build(model, donated)
    return find_regions(build_graph(trace_step(step, args, {}, donate_argnums=donate)))


@functools.cache
def memory_model(model: str, donated: bool, platform: Platform) -> MemoryModel:
    regions = regions_of(model, donated)
    return MemoryModel(regions, lifetimes(regions.graph, compiler_of(platform)), family_keys(regions))


@functools.cache
def families_of(model: str, donated: bool) -> dict[str, list[int]]:
    return members(family_keys(regions_of(model, donated)))


def assignments_text(layout: Layout) -> str:
    """A plan in a line: for each family, in order, the atom of each mesh axis, and where sums are scattered."""

    def text(a: Assignment) -> str:
        return ",".join(
            "" if atom == UNUSED else f"{atom}" if to == UNUSED else f"{atom}>{to}"
            for atom, to in zip(a.atoms, a.scatter, strict=True)
        )

    families = members(family_keys(layout.regions))
    return " ".join(text(layout.assignments[regions[0]]) or "-" for regions in families.values())


def layout_of(case: Case, text: str) -> Layout:
    """The plan of a line, on its program."""
    regions = regions_of(case.model, case.donated)
    families = families_of(case.model, case.donated)
    chosen = [Assignment((UNUSED,) * len(case.mesh), (UNUSED,) * len(case.mesh))] * len(regions.regions)
    for entry, family in zip(text.split(" "), families.values(), strict=True):
        parts = [p.partition(">") for p in entry.strip("-").split(",")]
        for region in family:
            chosen[region] = Assignment(
                tuple(int(atom) if atom else UNUSED for atom, _, _ in parts),
                tuple(int(to) if to else UNUSED for _, _, to in parts),
            )
    mesh = MeshShape(tuple(case.mesh), tuple(case.mesh.values()))
    return Layout(regions=regions, mesh=mesh, assignments=chosen, axis_prices=(1.0,) * len(case.mesh))


def predicted_bytes(case: Case, text: str, platform: Platform) -> float:
    """What the model says of a recorded plan."""
    return memory_model(case.model, case.donated, platform).peak(layout_of(case, text)).bytes
