"""The cases of the memory benchmark and of its gate, and what was compiled of them.

`benchmarks/memory.py --record tests/data/memory_compiled.json` writes the file; `predictions` predicts each of its
cases again, on the plan that was compiled, without compiling or searching.
"""

from __future__ import annotations

import dataclasses
import functools
import importlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from plan_lines import layout_of

from ffjax.cost.compilers import compiler_of
from ffjax.cost.hardware import Platform
from ffjax.cost.lifetimes import lifetimes
from ffjax.cost.memory import MemoryModel
from ffjax.ir.graph import build_graph
from ffjax.ir.layout import Layout
from ffjax.ir.regions import Regions, find_regions
from ffjax.planning.tracing import trace_step
from ffjax.strategies.families import family_keys

RECORDED = Path(__file__).parent / "data" / "memory_compiled.json"
MESHES = ({"x": 8}, {"x": 4, "y": 2})
STRATEGIES = ("auto", "data_parallel", "fsdp", "tensor_parallel", "fsdp+tensor_parallel")
GPT = {"layers": 2, "d_model": 1024, "seq_len": 512, "batch": 64}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "gpt": ("gpt", GPT),
    "gpt remat": ("gpt", GPT | {"remat": True}),
    "gpt scanned": ("gpt", GPT | {"layers": 6, "scan_layers": True}),
    "gpt scanned remat": ("gpt", GPT | {"layers": 6, "scan_layers": True, "remat": True}),
    "gpt bfloat16": (
        "gpt",
        GPT | {"layers": 6, "scan_layers": True, "remat": True, "dtype": "bfloat16", "vocab": 8192},
    ),
    "convnet": ("convnet", {"widths": (128, 256), "batch": 4096}),
    "recommender": (
        "recommender",
        {
            "rows": (800_000, 160_000, 8_000, 512, 128, 32, 24),
            "width": 64,
            "batch": 32_768,
            "bottom": (512, 256),
            "top": (1024, 1024, 512),
        },
    ),
    "moe": ("moe", {"d_model": 512, "d_expert": 2048, "vocab": 1024, "seq_len": 256, "batch": 64}),
    # Compiled once the model of memory was as it is: nothing in it was chosen by these.
    "gpt held out": (
        "gpt",
        {"layers": 5, "d_model": 768, "heads": 8, "seq_len": 1024, "batch": 32, "tied_head": True, "vocab": 4096},
    ),
    "gpt scanned held out": (
        "gpt",
        {"layers": 10, "d_model": 512, "seq_len": 2048, "batch": 16, "scan_layers": True, "dropout": 0.1},
    ),
    "convnet held out": ("convnet", {"widths": (64, 128, 256), "blocks": 3, "batch": 8192}),
    "moe held out": (
        "moe",
        {"layers": 3, "d_model": 768, "d_expert": 1536, "experts": 16, "vocab": 4096, "seq_len": 128, "batch": 128},
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    model: str
    mesh: dict[str, int]
    strategy: str
    donated: bool = True

    @property
    def mesh_text(self) -> str:
        return "x".join(map(str, self.mesh.values()))

    @property
    def plan(self) -> str:
        """Its plan in the file: what is donated makes no difference to that."""
        return f"{self.model}, {self.mesh_text}, {self.strategy}"


def cases(names: list[str]) -> Iterator[Case]:
    for donated in (True, False):
        for model in names:
            for mesh in MESHES:
                for strategy in STRATEGIES:
                    if strategy != "fsdp+tensor_parallel" or len(mesh) > 1:
                        yield Case(model=model, mesh=mesh, strategy=strategy, donated=donated)


def build(model: str, donated: bool) -> tuple[Callable[..., object], tuple[object, ...], tuple[int, ...]]:
    """The step of a model, its arguments' shapes, and which of them are donated."""
    example, options = MODELS[model]
    module = importlib.import_module(f"ffjax.examples.{example}")
    config = dataclasses.replace(module.Config.small(), **options)
    donate = () if not donated else (0, 1) if example == "convnet" else (0,)
    return module.make_train_step(config), module.example_args(config), donate


@functools.cache
def regions_of(model: str, donated: bool) -> Regions:
    if not donated:
        regions = regions_of(model, True)
        program = dataclasses.replace(regions.graph.program, donated=(False,) * len(regions.graph.program.args))
        return dataclasses.replace(regions, graph=dataclasses.replace(regions.graph, program=program))
    step, args, donate = build(model, donated)
    return find_regions(build_graph(trace_step(step, args, {}, donate_argnums=donate)))


@functools.cache
def keys_of(model: str) -> list[str]:
    return family_keys(regions_of(model, True))


@functools.cache
def memory_model(model: str, donated: bool, platform: Platform) -> MemoryModel:
    regions = regions_of(model, donated)
    return MemoryModel(regions, lifetimes(regions.graph, compiler_of(platform)), keys_of(model))


def plan_of(case: Case, line: str) -> Layout:
    """The recorded plan of a case, on its program."""
    return layout_of(line, regions_of(case.model, case.donated), keys_of(case.model), case.mesh)


@dataclass(slots=True, kw_only=True)
class Recorded:
    """What was compiled on one platform: for each plan its line, and its bytes where arguments are donated or kept."""

    jax: str
    plans: dict[str, str]
    donated: dict[str, int]
    kept: dict[str, int]

    @classmethod
    def read(cls, path: Path, platform: Platform) -> Recorded:
        everything = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        return cls(**everything.get(platform, {"jax": "", "plans": {}, "donated": {}, "kept": {}}))

    def write(self, path: Path, platform: Platform) -> None:
        everything = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
        everything["made by"] = (
            "python benchmarks/memory.py --platform PLATFORM --record tests/data/memory_compiled.json"
        )
        everything[platform] = dataclasses.asdict(self)
        path.write_text(json.dumps(everything, indent=0) + "\n", encoding="utf-8")

    def compiled(self, case: Case) -> dict[str, int]:
        return self.donated if case.donated else self.kept


def predictions(recorded: Recorded, platform: Platform) -> Iterator[tuple[Case, float, float]]:
    """For each recorded case: what the model predicts, and what was compiled."""
    for case in cases(list(MODELS)):
        if case.plan in recorded.compiled(case):
            model = memory_model(case.model, case.donated, platform)
            layout = plan_of(case, recorded.plans[case.plan])
            predicted = model.under(layout).peak(layout).bytes
            yield case, predicted, recorded.compiled(case)[case.plan]
