import numpy as np
import pytest
from scipy.sparse import csr_matrix
from scipy.sparse.csgraph import maximum_flow

from limner.max_flow import Network, empty_network, send, source_side

SHAPE = (5, 6, 7)


def random_network(seed: int) -> Network:
    """A grid whose capacities differ from pair to pair and way to way, many of them 0; an idle plane on either side."""
    draw = np.random.default_rng(seed)
    _, y, x = SHAPE
    network = empty_network((SHAPE[0] + 2) * y * x, np.array([-y * x, y * x, -x, x, -1, 1]))
    network.nodes["excess"][y * x : -y * x] = draw.integers(-60, 61, np.prod(SHAPE))
    capacity = draw.integers(-15, 40, (*SHAPE, 6)).clip(0)
    for axis in range(3):
        np.moveaxis(capacity, axis, 0)[0, ..., 2 * axis] = 0
        np.moveaxis(capacity, axis, 0)[-1, ..., 2 * axis + 1] = 0
    network.nodes["capacity"][y * x : -y * x] = capacity.reshape(-1, 6)
    return network


def edges(network: Network) -> list[tuple[int, int, int]]:
    """(from, to, capacity), the source second to last and the sink last."""
    n = len(network.nodes)
    found = []
    for v in range(n):
        excess = int(network.nodes["excess"][v])
        found.append((n, v, excess) if excess > 0 else (v, n + 1, -excess))
        for d in np.flatnonzero(network.nodes["capacity"][v]):
            found.append((v, int(v + network.steps[d]), int(network.nodes["capacity"][v, d])))
    return found


@pytest.mark.parametrize("seed", range(12))
def test_cut_has_the_value_of_the_maximum_flow(seed):
    network = random_network(seed)
    given = edges(network)
    n = len(network.nodes)
    origin, end, capacity = (np.array(column) for column in zip(*given, strict=True))
    flow = maximum_flow(csr_matrix((capacity.astype(np.int32), (origin, end)), (n + 2, n + 2)), n, n + 1).flow_value
    reached = np.append(source_side(network), [True, False])
    assert sum(c for v, w, c in given if reached[v] and not reached[w]) == flow > 0


@pytest.mark.parametrize("seed", range(3))
def test_what_remains_is_a_maximum_flow(seed):
    """No residual path leads from an excess to a deficit, and capacities and excess add up to what they were."""
    network = random_network(seed)
    before = network._replace(nodes=network.nodes.copy())
    reached = source_side(network)
    assert not (network.nodes["excess"][~reached] > 0).any()
    assert not (network.nodes["excess"][reached] < 0).any()
    sent = before.nodes["capacity"].astype(int) - network.nodes["capacity"]
    for v, d in np.argwhere(sent):
        assert sent[v, d] == -sent[v + network.steps[d], d ^ 1]
    for v, d in np.argwhere(network.nodes["capacity"]):
        assert not (reached[v] and not reached[v + network.steps[d]])
    lost = before.nodes["excess"] - network.nodes["excess"]
    kept = np.sign(before.nodes["excess"]) * network.nodes["excess"] >= 0
    assert kept.all()
    np.testing.assert_array_equal(lost, sent.sum(axis=1))


def test_neighbours_by_number_give_the_same_cut():
    network, other = random_network(5), random_network(5)
    numbers = np.arange(len(network.nodes))[:, None] + network.steps
    inside = (numbers >= 0) & (numbers < len(network.nodes))
    listed = other._replace(steps=np.where(inside, numbers, 0).astype(np.int32))
    np.testing.assert_array_equal(source_side(listed), source_side(network))


def test_the_smallest_source_side_is_chosen():
    """Two nodes that hold together and are drawn alike to both ends."""
    network = empty_network(6, np.array([0, 0, 0, 0, -1, 1]))
    network.nodes["excess"] = [0, 5, 0, 0, -5, 0]
    for v in range(1, 4):
        network.nodes["capacity"][v, 5] = network.nodes["capacity"][v + 1, 4] = 3
    assert source_side(network).tolist() == [False, True, False, False, False, False]


def test_parts_sent_through_before_they_are_joined_give_the_same_cut():
    expected = source_side(random_network(6))
    network = random_network(6)
    half = 4 * SHAPE[1] * SHAPE[2]
    above, below = slice(half - 42, half), slice(half, half + 42)
    kept = [network.nodes["capacity"][above, 1].copy(), network.nodes["capacity"][below, 0].copy()]
    network.nodes["capacity"][above, 1] = network.nodes["capacity"][below, 0] = 0
    send(network, 0, half)
    send(network, half, len(network.nodes))
    assert not network.queues.any()
    network.nodes["capacity"][above, 1], network.nodes["capacity"][below, 0] = kept
    assert all(k.any() for k in kept)
    np.testing.assert_array_equal(source_side(network), expected)
