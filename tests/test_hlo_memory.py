"""Bytes that are live while a module runs: by hand on small texts, and against the compiler's own figures."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import pytest

from ffjax.cost.cluster import Cluster
from ffjax.cost.hlo.collectives import peak_bytes
from ffjax.cost.hlo.memory import live_bytes
from ffjax.cost.hlo.module import parse_module
from ffjax.cost.hlo.simulator import simulate_hlo
from ffjax.cost.hlo.source import read_module

INNER = """
%updated (a: f32[8,8], u: f32[1,8], i: s32[]) -> f32[8,8] {
  %a = f32[8,8]{1,0} parameter(0)
  %u = f32[1,8]{1,0} parameter(1)
  %i = s32[] parameter(2)
  ROOT %w = f32[8,8]{1,0} dynamic-update-slice(%a, %u, %i, %i)
}

%body (t: (f32[8,8])) -> (f32[8,8]) {
  %t = (f32[8,8]{1,0}) parameter(0)
  %g = f32[8,8]{1,0} get-tuple-element(%t), index=0
  %b1 = f32[8,8]{1,0} transpose(%g), dimensions={1,0}
  %b2 = f32[8,8]{1,0} transpose(%b1), dimensions={1,0}
  ROOT %o = (f32[8,8]{1,0}) tuple(%b2)
}
"""


def live(body: str, alias: str = "") -> dict[str, float]:
    return live_bytes(
        parse_module(f"""HloModule m, is_scheduled=true{alias}
{INNER}
ENTRY %main (p: f32[8,8], r: f32[1,8]) -> f32[8,8] {{
  %p = f32[8,8]{{1,0}} parameter(0)
  %r = f32[1,8]{{1,0}} parameter(1)
{body}
}}
""")
    )


T = "f32[8,8]{1,0} transpose"
ARGUMENTS = 256 + 32


def test_a_buffer_lives_until_it_is_last_read() -> None:
    found = live(f"""
  %a = {T}(%p), dimensions={{1,0}}
  %b = {T}(%a), dimensions={{1,0}}
  %c = {T}(%b), dimensions={{1,0}}
  ROOT %d = f32[1,8]{{1,0}} slice(%c), slice={{[0:1],[0:8]}}
""")
    assert {k: v - ARGUMENTS for k, v in found.items()} == {"p": 0, "r": 0, "a": 256, "b": 512, "c": 512, "d": 288}


def test_names_make_no_buffers_and_keep_them() -> None:
    found = live(f"""
  %a = {T}(%p), dimensions={{1,0}}
  %v = f32[64]{{0}} bitcast(%a)
  %t = (f32[64]{{0}}, f32[1,8]{{1,0}}) tuple(%v, %r)
  %b = {T}(%p), dimensions={{1,0}}
  %g = f32[64]{{0}} get-tuple-element(%t), index=0
  ROOT %c = {T}(%g), dimensions={{1,0}}
""")
    assert {k: found[k] - ARGUMENTS for k in ("v", "t", "b", "g", "c")} == {
        "v": 256,
        "t": 256,
        "b": 512,
        "g": 256,
        "c": 512,
    }


def test_elementwise_kernels_write_over_what_they_read_last() -> None:
    found = live(f"  %a = {T}(%p), dimensions={{1,0}}\n  %b = f32[8,8]{{1,0}} negate(%a)\n  ROOT %c = {T}(%b)")
    assert found["b"] == ARGUMENTS + 256
    # But not over an argument.
    assert live("  ROOT %a = f32[8,8]{1,0} negate(%p)")["a"] == ARGUMENTS + 256


def test_updates_are_in_place() -> None:
    found = live(f"""
  %a = {T}(%p), dimensions={{1,0}}
  %z = s32[] constant(0)
  %u = f32[8,8]{{1,0}} fusion(%a, %r, %z), kind=kLoop, calls=%updated
  ROOT %w = f32[8,8]{{1,0}} dynamic-update-slice(%u, %r, %z, %z)
""")
    assert max(found.values()) == ARGUMENTS + 256


def test_a_result_in_a_donated_argument_costs_nothing() -> None:
    body = f"  ROOT %a = {T}(%p), dimensions={{1,0}}"
    assert live(body)["a"] == ARGUMENTS + 256
    assert live(body, ", input_output_alias={ {}: (0, {}, may-alias) }")["a"] == ARGUMENTS


def test_a_loop_adds_what_its_body_holds() -> None:
    found = live(f"""
  %a = {T}(%p), dimensions={{1,0}}
  %in = (f32[8,8]{{1,0}}) tuple(%a)
  %l = (f32[8,8]{{1,0}}) while(%in), condition=%body, body=%body, backend_config={{"known_trip_count":{{"n":"3"}}}}
  ROOT %g2 = f32[8,8]{{1,0}} get-tuple-element(%l), index=0
""")
    assert found["l"] == ARGUMENTS + 256 + 512
    assert found["g2"] == ARGUMENTS + 256


def test_asynchronous_collectives_hold_both_sides() -> None:
    found = live(f"""
  %a = {T}(%p), dimensions={{1,0}}
  %s = (f32[8,8]{{1,0}}, f32[16,8]{{1,0}}) all-gather-start(%a), replica_groups={{}}, dimensions={{0}}
  %d = f32[16,8]{{1,0}} all-gather-done(%s)
  ROOT %e = f32[1,8]{{1,0}} slice(%d), slice={{[0:1],[0:8]}}
""")
    assert {k: found[k] - ARGUMENTS for k in "asde"} == {"a": 256, "s": 256 + 512, "d": 512, "e": 544}


@pytest.mark.parametrize("scanned", [True, False])
def test_peak_is_the_compilers(scanned: bool) -> None:
    def step(w: jax.Array, x: jax.Array) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            def layer(h: jax.Array, wi: jax.Array) -> tuple[jax.Array, None]:
                return jnp.tanh(h @ wi), None

            h = jax.lax.scan(layer, x, w, unroll=1 if scanned else len(w))[0]
            return (h**2).sum()

        return w - jax.grad(loss)(w)

    compiled = jax.jit(step, donate_argnums=0).lower(jnp.ones((6, 128, 128)), jnp.ones((512, 128))).compile()
    peak = max(live_bytes(read_module(compiled)).values())
    assert peak == pytest.approx(peak_bytes(compiled), rel=0.05)
    timeline = simulate_hlo(compiled, Cluster.named("cpu"))
    assert max(size for _, size in timeline.memory) == peak
    assert [at for at, _ in timeline.memory] == sorted(at for at, _ in timeline.memory)
