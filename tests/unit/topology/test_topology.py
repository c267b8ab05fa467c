from __future__ import annotations

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ds_cp.errors import TopologyError
from ds_cp.topology import Grid, Topology, rank_text, resolve_grid

placements = st.lists(st.sampled_from(["a", "b", "c", "d"]), min_size=1, max_size=16)


def round_crossings(hosts: list[str], order: list[int] | tuple[int, ...]) -> int:
    """Steps of one closed round that go to another host, counted without Topology."""
    steps = zip(order, [*order[1:], order[0]], strict=True)
    return sum(hosts[a] != hosts[b] for a, b in steps)


@given(placements, st.randoms(use_true_random=False))
def test_ring_order_enters_each_host_once(hosts: list[str], rng: random.Random) -> None:
    topology = Topology.from_hosts(hosts)
    order = topology.ring_order()
    assert sorted(order) == list(range(len(hosts)))
    distinct = len(set(hosts))
    assert round_crossings(hosts, order) == (distinct if distinct > 1 else 0)
    assert topology.crossings(order) == round_crossings(hosts, order)
    # Any other order crosses at least as often.
    shuffled = list(order)
    rng.shuffle(shuffled)
    assert round_crossings(hosts, shuffled) >= round_crossings(hosts, order)
    assert topology.crossings(shuffled) == round_crossings(hosts, shuffled)


@given(placements)
def test_hosts_and_local_ranks(hosts: list[str]) -> None:
    topology = Topology.from_hosts(hosts)
    assert topology.size == len(hosts)
    assert topology.host_index(0) == 0
    seen: dict[str, int] = {}
    for rank, name in enumerate(hosts):
        assert topology.host_names[topology.host_index(rank)] == name
        assert topology.local_rank(rank) == seen.get(name, 0)
        assert topology.local_size(rank) == hosts.count(name)
        assert rank in topology.ranks_on(topology.host_index(rank))
        seen[name] = seen.get(name, 0) + 1
    assert topology.num_hosts == len(seen)
    assert list(topology.leaders) == [hosts.index(name) for name in topology.host_names]
    assert all(topology.local_rank(rank) == 0 for rank in topology.leaders)


@given(placements, st.data())
def test_subset_is_the_topology_of_its_ranks(hosts: list[str], data: st.DataObject) -> None:
    ranks = data.draw(st.permutations(range(len(hosts))))
    ranks = ranks[: data.draw(st.integers(1, len(hosts)))]
    subset = Topology.from_hosts(hosts).subset(ranks)
    assert list(subset.hosts) == [hosts[rank] for rank in ranks]


def test_describe() -> None:
    assert Topology.from_hosts(["vm"] * 4).describe() == ["1 host: vm ranks 0-3"]
    assert Topology.from_hosts(["vm"]).describe() == ["1 host: vm rank 0"]
    two = Topology.from_hosts(["nodeA", "nodeA", "nodeB", "nodeB"]).describe()
    assert two[0] == "2 hosts: nodeA ranks 0-1, nodeB ranks 2-3"
    interleaved = Topology.from_hosts(["a", "b", "a", "b"]).describe()
    assert interleaved == [
        "2 hosts: a ranks 0,2, b ranks 1,3",
        "ring order 0 2 1 3: 2 of 4 steps cross a host border",
    ]


def test_rank_text() -> None:
    assert rank_text((0, 1, 2, 5, 7, 8)) == "0-2,5,7-8"
    assert rank_text(()) == ""


def test_bad_topologies() -> None:
    with pytest.raises(TopologyError, match="at least one rank"):
        Topology.from_hosts([])
    with pytest.raises(TopologyError, match="rank 1 has no host name"):
        Topology.from_hosts(["a", ""])
    topology = Topology.from_hosts(["a", "b"])
    with pytest.raises(TopologyError, match=r"rank 2 is not in 0\.\.1"):
        topology.host_index(2)
    with pytest.raises(TopologyError, match="rank -1"):
        topology.local_rank(-1)
    with pytest.raises(TopologyError, match="twice"):
        topology.subset([0, 0])
    with pytest.raises(TopologyError, match="at least one rank"):
        topology.subset([])
    with pytest.raises(TopologyError, match="host index 2"):
        topology.ranks_on(2)


@given(st.integers(1, 6), st.integers(1, 4))
def test_grid(cp_size: int, tp_size: int) -> None:
    hosts = [f"h{i}" for i in range(cp_size) for _ in range(tp_size)]
    topology = Topology.from_hosts(hosts)
    grid = resolve_grid(topology, "auto", tp_size)
    assert grid == Grid(topology, cp_size, tp_size) == resolve_grid(topology, cp_size, tp_size)
    for cp_index in range(cp_size):
        for tp_index in range(tp_size):
            rank = cp_index * tp_size + tp_index
            assert grid.coords(rank) == (cp_index, tp_index)
            assert grid.rank_of(cp_index, tp_index) == rank
            assert grid.cp_groups()[tp_index][cp_index] == rank
            assert grid.tp_groups()[cp_index][tp_index] == rank
    # One tp group a host here, so a cp group has one rank on each.
    assert grid.cp_topology(tp_size - 1).hosts == tuple(f"h{i}" for i in range(cp_size))


def test_grid_over_two_hosts() -> None:
    grid = Grid(Topology.from_hosts(["a", "a", "b", "b"]), 2, 2)
    assert grid.cp_groups() == ((0, 2), (1, 3))
    assert grid.tp_groups() == ((0, 1), (2, 3))
    assert grid.cp_topology(1).num_hosts == 2


def test_grid_errors_name_the_factors() -> None:
    four = Topology.from_hosts(["a"] * 4)
    with pytest.raises(TopologyError) as error:
        Grid(four, 3, 2)
    for part in ("context_parallel.size 3", "tensor_parallel.tp_size 2", "= 6", "4 ranks", "auto"):
        assert part in str(error.value)
    with pytest.raises(TopologyError, match=r"tp_size 3 does not divide the 4 ranks"):
        resolve_grid(four, "auto", 3)
    with pytest.raises(TopologyError, match="at least 1"):
        resolve_grid(four, "auto", 0)
    with pytest.raises(TopologyError, match="rank 4"):
        Grid(four, 2, 2).coords(4)
    with pytest.raises(TopologyError, match=r"\(2, 0\) is outside"):
        Grid(four, 2, 2).rank_of(2, 0)


def test_tensor_parallel_stays_on_a_host() -> None:
    with pytest.raises(TopologyError) as error:
        Grid(Topology.from_hosts(["a", "b", "a", "b"]), 2, 2)
    for part in ("rank 0 on a, rank 1 on b", "tp_size 2", "--map-by slot"):
        assert part in str(error.value)
    assert "\n" not in str(error.value)
