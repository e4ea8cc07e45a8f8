"""Collective costs: affine in bytes, nothing for a group of one, and bound by the links that the group crosses."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ffjax.cost.cluster import Cluster
from ffjax.cost.collectives import CollectiveModel, collective_seconds
from ffjax.errors import ClusterError
from ffjax.ir.spec import COLLECTIVE_KINDS, Collective, CollectiveKind, MeshShape

GIB = float(2**30)
H100 = Cluster.named("h100", hosts=8)
XY = MeshShape(("x", "y"), (8, 8))  # x across hosts, y inside
KINDS = st.sampled_from(COLLECTIVE_KINDS)


def _models(name: str, hosts: int, devices_per_host: int) -> list[CollectiveModel]:
    cluster = Cluster.named(name, hosts, devices_per_host)
    return [CollectiveModel(mesh, cluster) for mesh in cluster.mesh_shapes()]


def _axes(mesh: MeshShape) -> list[tuple[str, ...]]:
    return [axes for n in range(len(mesh.axes) + 1) for axes in itertools.combinations(mesh.axes, n)]


@pytest.mark.parametrize("kind", COLLECTIVE_KINDS)
@pytest.mark.parametrize(("hosts", "devices_per_host"), [(1, 1), (1, 8), (2, 1), (3, 4), (16, 8)])
@pytest.mark.parametrize("name", Cluster.names())
def test_every_collective_on_every_mesh(name: str, hosts: int, devices_per_host: int, kind: CollectiveKind) -> None:
    for model in _models(name, hosts, devices_per_host):
        for axes in _axes(model.mesh):
            alpha_s, beta = model.coefficients(kind, axes)
            if model.mesh.size(axes) == 1:
                assert (alpha_s, beta) == (0.0, 0.0)
                continue
            assert alpha_s >= model.cluster.device.kernel_s
            # No collective moves a byte faster than the fastest link, or slower than twice over the slowest.
            n = model.mesh.size(axes)
            least = min(1.0, 2 * (n - 1) / n) if kind in ("all_reduce", "collective_permute") else 0.0
            fast, slow = model.cluster.links[0], model.cluster.links[1]
            assert least / fast.effective_bytes_per_s <= beta <= 2 / slow.effective_bytes_per_s
            assert model.seconds(Collective(kind, axes, GIB)) == pytest.approx(alpha_s + beta * GIB)


@given(kind=KINDS, size=st.floats(0, 1e12), more=st.floats(0, 1e12), axes=st.sampled_from(_axes(XY)))
def test_seconds_grow_with_bytes(kind: CollectiveKind, size: float, more: float, axes: tuple[str, ...]) -> None:
    few, many = (collective_seconds(Collective(kind, axes, b), XY, H100) for b in (size, size + more))
    assert 0 <= few <= many


@given(kind=KINDS, inner=st.sampled_from([2, 4, 8]))
def test_larger_groups_inside_a_host_cost_no_less(kind: CollectiveKind, inner: int) -> None:
    cluster = Cluster.named("h100")
    mesh = MeshShape(("x", "y", "z"), (2, 2, 2))
    model = CollectiveModel(mesh, cluster)
    costs = [model.seconds(Collective(kind, axes, GIB)) for axes in (("x",), ("x", "y"), ("x", "y", "z"))]
    assert costs == sorted(costs)


def test_all_reduce_is_reduce_scatter_and_all_gather() -> None:
    for model in _models("h100", 8, 8):
        for axes in _axes(model.mesh):
            whole, scatter, gather = (
                model.coefficients(kind, axes) for kind in ("all_reduce", "reduce_scatter", "all_gather")
            )
            assert whole[1] == pytest.approx(scatter[1] + gather[1])
            assert whole[0] <= scatter[0] + gather[0]  # in fewer steps


def test_cpu_runs_a_reduce_scatter_as_an_all_reduce() -> None:
    model = CollectiveModel(MeshShape(("x",), (8,)), Cluster.named("cpu"))
    assert model.coefficients("reduce_scatter", ("x",)) == model.coefficients("all_reduce", ("x",))


def test_all_gather_inside_a_host_is_bound_by_nvlink() -> None:
    _, beta = CollectiveModel(XY, H100).coefficients("all_gather", ("y",))
    assert beta == pytest.approx(7 / 8 / (450e9 * 0.8))


def test_all_gather_across_hosts_is_bound_by_one_adapter() -> None:
    _, beta = CollectiveModel(XY, H100).coefficients("all_gather", ("x",))
    assert beta == pytest.approx(7 / 8 / (50e9 * 0.9))


def test_a_group_uses_the_adapters_of_all_its_devices_on_a_host() -> None:
    model = CollectiveModel(MeshShape(("x", "y"), (16, 4)), H100)  # x: two devices on each host
    assert model.coefficients("all_gather", ("x",))[1] == pytest.approx(15 / 16 / (2 * 50e9 * 0.9))
    # Eight adapters together are as fast as NVLink on H100 hosts, and on V100 hosts never.
    assert model.coefficients("all_gather", ("x", "y"))[1] == pytest.approx(63 / 64 / (450e9 * 0.8))
    slow = CollectiveModel(XY, Cluster.named("v100", hosts=8))
    assert slow.coefficients("all_gather", ("x", "y"))[1] == pytest.approx(63 / 64 / (25e9 / 8 * 0.8))


def test_all_to_all_across_hosts_is_bound_by_the_share_of_the_network() -> None:
    model = CollectiveModel(MeshShape(("x",), (64,)), H100)
    assert model.coefficients("all_to_all", ("x",))[1] == pytest.approx(56 / 64 / (50e9 * 0.9))
    inside = CollectiveModel(XY, H100)
    assert inside.coefficients("all_to_all", ("y",))[1] == pytest.approx(7 / 8 / (450e9 * 0.8))


def test_collective_permute_is_one_hop_of_the_slowest_link() -> None:
    model = CollectiveModel(XY, H100)
    inner, outer = H100.links
    for axes, link in ((("y",), inner), (("x",), outer), (("x", "y"), outer)):
        assert model.coefficients("collective_permute", axes) == pytest.approx(
            (H100.device.kernel_s + link.latency_s, 1 / link.effective_bytes_per_s)
        )


def test_all_reduce_steps_are_logarithmic() -> None:
    inner, outer = H100.links
    alpha_s, _ = CollectiveModel(XY, H100).coefficients("all_reduce", ("x", "y"))
    assert alpha_s == pytest.approx(H100.device.kernel_s + 2 * 3 * (inner.latency_s + outer.latency_s))
    gather_s, _ = CollectiveModel(XY, H100).coefficients("all_gather", ("x", "y"))
    assert gather_s == pytest.approx(H100.device.kernel_s + 56 * inner.latency_s + 7 * outer.latency_s)


def test_one_link_is_enough_for_one_host() -> None:
    one = Cluster(
        name="one",
        hosts=1,
        devices_per_host=8,
        device=H100.device,
        links=H100.links[:1],
        reduce_scatter=True,
    )
    mesh = MeshShape(("x",), (8,))
    assert collective_seconds(Collective("all_gather", ("x",), GIB), mesh, one) == pytest.approx(
        collective_seconds(Collective("all_gather", ("x",), GIB), mesh, Cluster.named("h100"))
    )


def test_order_of_axes_does_not_matter() -> None:
    model = CollectiveModel(XY, H100)
    for kind in COLLECTIVE_KINDS:
        assert model.coefficients(kind, ("x", "y")) == model.coefficients(kind, ("y", "x"))


def test_refuses_what_does_not_fit() -> None:
    with pytest.raises(ClusterError, match=r"mesh 8x8 has 64 devices but cluster 'h100' has 8"):
        CollectiveModel(XY, Cluster.named("h100"))
    with pytest.raises(ClusterError, match="no axis 'z'; its axes are x, y"):
        collective_seconds(Collective("all_gather", ("z",), 1.0), XY, H100)
    with pytest.raises(ClusterError, match="unknown collective 'all_shuffle'; known: all_gather, all_reduce"):
        CollectiveModel(XY, H100).coefficients("all_shuffle", ("x",))  # type: ignore[arg-type]
