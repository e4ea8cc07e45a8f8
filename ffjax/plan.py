"""The plan: what was decided, as data that a person can review, diff, pin and commit, and what can be done with it.

A plan made or loaded here can be printed and compared anywhere; to be lowered it must be bound to the program that it
was made for (`ffjax.plan` does so, a loaded one is bound by `plan.bind` or by passing it to `ffjax.autoshard`).
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import jax
from jax.sharding import PartitionSpec

from ffjax.arguments import Names, Numbers
from ffjax.cost.cluster import Cluster
from ffjax.cost.simulation.timeline import Timeline
from ffjax.emit.emit import partition_spec
from ffjax.emit.run import lower
from ffjax.errors import PlanError
from ffjax.explain import diff, explain
from ffjax.ir.trace import Program
from ffjax.plan_record import Placement, PlanRecord
from ffjax.planning.binding import bound_layout
from ffjax.planning.tracing import trace_step
from ffjax.simulating import cluster_of_plan, simulate_plan
from ffjax.state import Places
from ffjax.verifying import Verification, verify


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan(PlanRecord):
    """A sharding plan for one program on one mesh. Make one with `ffjax.plan`, read one with `Plan.load`."""

    @property
    def in_specs(self) -> Any:
        """PartitionSpecs shaped like the arguments: `(args, kwargs)`; by path where the plan is not bound."""
        return self._tree(self.args, None if self.layout is None else self._program.in_tree)

    @property
    def out_specs(self) -> Any:
        """PartitionSpecs shaped like the results; by path where the plan is not bound."""
        return self._tree(self.results, None if self.layout is None else self._program.out_tree)

    def _tree(self, placements: Sequence[Placement], tree: Any) -> Any:
        specs = {p.path: partition_spec(p.spec) for p in placements}
        return specs if tree is None else jax.tree.unflatten(tree, list(specs.values()))

    @property
    def _program(self) -> Program:
        return self.bound.graph.program

    def spec(self, path: str) -> PartitionSpec:
        """The PartitionSpec of one argument or result, by its path (`state/params/dense/kernel`)."""
        for placement in self.args + self.results:
            if placement.path == path:
                return partition_spec(placement.spec)
        raise PlanError(
            f"the plan has no argument or result {path!r}; it has {', '.join(p.path for p in self.args[:8])}, ..."
        )

    def bind(
        self,
        step: Any,
        *args: Any,
        static_argnums: Numbers = None,
        static_argnames: Names = None,
        donate_argnums: Numbers = None,
        donate_argnames: Names = None,
        **kwargs: Any,
    ) -> Plan:
        """This plan on a program: traces `step` and checks that it is the one that the plan was made for."""
        program = trace_step(
            step,
            args,
            kwargs,
            static_argnums=static_argnums,
            static_argnames=static_argnames,
            donate_argnums=donate_argnums,
            donate_argnames=donate_argnames,
            remat=self.remat,
        )
        return self.bind_program(program)

    def bind_program(self, program: Program) -> Plan:
        """This plan on a program that is traced already, under the plan's policy; raises PlanMismatch for another."""
        return dataclasses.replace(self, layout=bound_layout(self, program))

    def lower(self, devices: Sequence[Any] | None = None) -> jax.stages.Lowered:
        """Lowers the sharded step: for `devices`, or, without any, for a mesh that need not exist."""
        return lower(self.bound, devices)

    def simulate(self, cluster: Cluster | None = None) -> Timeline:
        """Simulates a step on one device: every kernel and collective, what overlaps, and memory over time.

        `cluster`: by default the one that the plan was made for; a loaded plan finds it if it is a shipped one.
        Raises PlanError for a plan that is not bound, or whose cluster is not known or is another.
        """
        return simulate_plan(self, cluster)

    def verify(self, cluster: Cluster | None = None, devices: Sequence[jax.Device] | None = None) -> Verification:
        """Compiles the plan, and puts what was predicted beside what the compiler made of it.

        Args:
          cluster: by default the one that the plan was made for; a loaded plan finds it if it is a shipped one.
          devices: to compile for; by default those here if they are the cluster's, else compile-only ones.

        Raises:
          PlanError: for a plan that is not bound, or whose cluster is not known or is another.
          ClusterError: where there are no devices to compile for.
        """
        return verify(self, cluster_of_plan(self, cluster), devices)

    def place_state(
        self,
        state: Any,
        argument: str | None = None,
        *,
        devices: Sequence[jax.Device] | None = None,
        donate: bool = False,
    ) -> Any:
        """A live state moved to where this plan wants it, on the first of `devices` (by default all).

        Needs no program: a loaded plan will do. See `place_state` of an autosharded step.
        """
        return Places(self, devices or jax.devices()).place_state(state, argument, donate=donate)

    def abstract_state(
        self, state: Any, argument: str | None = None, *, devices: Sequence[jax.Device] | None = None
    ) -> Any:
        """Shapes, dtypes and shardings of a state under this plan; see `abstract_state` of an autosharded step."""
        return Places(self, devices or jax.devices()).abstract_state(state, argument)

    def explain(self, details: bool = False) -> str:
        """Why: what is sharded how, what it costs, and what the runner-up would have cost."""
        return explain(self, details=details)

    def diff(self, other: PlanRecord) -> str:
        """The differences to another plan, one line each; empty if there is none."""
        return diff(self, other)
