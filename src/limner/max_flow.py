"""Maximum flow on a grid of which only residual capacities are stored, by the growing of two search trees.

Boykov and Kolmogorov 2004, https://doi.org/10.1109/TPAMI.2004.60: one tree grows from the source, one from the sink.

| section 3.2 of the paper | function |
| --- | --- |
| growth stage | `_grow` |
| augmentation stage | `_augment` |
| adoption stage | `_adopt` |

A node's origin is remembered for the length of an adoption stage, with its distance (`_distance_to_root`), so that
paths stay short and are not walked twice. There is no graph: the six neighbours of a node are its number plus six
fixed steps (or, for nodes that do not fill a box, six numbers a node).
"""

from __future__ import annotations

from typing import Any, NamedTuple, TypeAlias

import numpy as np
from numba import njit
from numpy.typing import NDArray

FREE, SOURCE, SINK = 0, 1, 2
ROOT, ORPHAN = 6, 7  # in the place of the direction to a parent
NONE, FAR = -1, 2**31 - 1
LARGEST_CAPACITY = 2**15 - 1  # both directions of a pair may end up in one of them

Array: TypeAlias = NDArray[Any]
NODE = np.dtype(
    [
        ("excess", np.int32),
        ("distance", np.int32),  # nodes from here to the root, root included, as known at ...
        ("stamp", np.int32),  # ... that time
        ("tree", np.uint8),  # FREE, SOURCE or SINK
        ("parent", np.uint8),  # direction to it, ROOT or ORPHAN
        ("capacity", np.uint16, 6),  # residual, towards each neighbour
    ],
    align=True,
)


class Network(NamedTuple):
    """What flows may still pass; see `empty_network`.

    Directions 0 to 5 are -z, +z, -y, +y, -x, +x: ``d ^ 1`` is opposite to d. No edge leaves the grid: its capacity is
    0 both ways, whatever node its step leads to. Every step from a node with excess or capacity must lead to some node,
    so that a box needs as many idle nodes before and after its own as its longest step.

    Parameters
    ----------
    nodes : ndarray of `NODE`
        Shape (N,). To be set: ``excess``, what may come from the source, or, below 0, go to the sink; and ``capacity``,
        what may go to each of the six neighbours.
    steps : ndarray of int
        Shape (6,): what is added to a node's number to get its neighbour's; or (N, 6): the neighbours' numbers.
    queues : ndarray of int32
        Shape (2, N), for the search; 0 before and after it.
    """

    nodes: Array
    steps: Array
    queues: Array


def empty_network(nodes: int, steps: Array) -> Network:
    """A network through which nothing flows yet; `steps` as for `Network`."""
    return Network(np.zeros(nodes, NODE), steps, np.zeros((2, nodes), np.int32))


def source_side(network: Network) -> NDArray[np.bool_]:
    """The nodes on the source's side of the minimum cut; of several, of the one with fewest such nodes.

    Parameters
    ----------
    network : Network
        Overwritten: what remains is the residual network.

    Returns
    -------
    ndarray of bool
        Shape (N,).

    Examples
    --------
    >>> network = empty_network(5, np.array([0, 0, 0, 0, -1, 1]))  # three nodes, and one more at either end
    >>> network.nodes["excess"] = 0, 5, -1, -3, 0
    >>> network.nodes["capacity"][1, 5] = network.nodes["capacity"][2, 4] = 2
    >>> network.nodes["capacity"][2, 5] = network.nodes["capacity"][3, 4] = 4
    >>> source_side(network)[1:-1]
    array([ True, False, False])
    """
    send(network, 0, len(network.nodes))
    return np.asarray(network.nodes["tree"] == SOURCE)


def send(network: Network, begin: int, end: int) -> None:
    """Send all that flows between nodes `begin` to `end` - 1, which no edge may join to others yet.

    Parts of a network may be sent through in threads of their own, before they are joined and `source_side` is called:
    the sides are the same.

    Parameters
    ----------
    network : Network
        Overwritten by what remains.
    begin, end : int
        Numbers of nodes.
    """
    _grow_trees(*network, np.array([NONE, NONE, NONE, NONE, 0]), begin, end)


# In what follows `after` holds two linked lists, of active nodes (0) and orphans (1): one more than the number of the
# next node, the last linked to itself; 0 where a node is not in it. `marks` holds the first and last of both lists, and
# the time.


@njit(cache=True, nogil=True)
def _grow_trees(nodes, steps, after, marks, begin, end):  # type: ignore[no-untyped-def]
    """Grow both trees until no path leads from source to sink."""
    _plant(nodes, steps, after, marks, begin, end)
    v = _pop(after, marks, 0)
    while v != NONE:
        meeting = _grow(nodes, steps, after, marks, v) if nodes[v].tree != FREE else NONE
        if meeting == NONE:
            v = _pop(after, marks, 0)
        else:
            _augment(nodes, steps, after, marks, v, meeting)
            _adopt(nodes, steps, after, marks)


@njit(cache=True, nogil=True)
def _plant(nodes, steps, after, marks, begin, end):  # type: ignore[no-untyped-def]
    """Every node with an excess is a root, and active if it has where to grow."""
    for v in range(begin, end):
        side = _side(nodes[v].excess)
        nodes[v].tree = side
        nodes[v].stamp = 0
        if side == FREE:
            continue
        nodes[v].parent = ROOT
        nodes[v].distance = 1
        for d in range(6):
            w = _neighbour(steps, v, d)
            if _side(nodes[w].excess) != side and _room(nodes, v, w, d, side) > 0:
                _append(after, marks, 0, v)
                break


@njit(cache=True, nogil=True)
def _side(excess):  # type: ignore[no-untyped-def]
    if excess == 0:
        return FREE
    return SOURCE if excess > 0 else SINK


@njit(cache=True, nogil=True)
def _neighbour(steps, v, d):  # type: ignore[no-untyped-def]
    if steps.ndim == 1:
        return v + steps[d]
    return steps[v, d]


@njit(cache=True, nogil=True)
def _room(nodes, parent, child, d, side):  # type: ignore[no-untyped-def]
    """Residual capacity between a parent and its child in direction d, the way that flow takes in their tree."""
    return np.int64(nodes[parent].capacity[d] if side == SOURCE else nodes[child].capacity[d ^ 1])


@njit(cache=True, nogil=True)
def _append(after, marks, queue, v):  # type: ignore[no-untyped-def]
    if after[queue, v] != 0:
        return
    after[queue, v] = v + 1
    if marks[2 * queue] == NONE:
        marks[2 * queue] = v
    else:
        after[queue, marks[2 * queue + 1]] = v + 1
    marks[2 * queue + 1] = v


@njit(cache=True, nogil=True)
def _pop(after, marks, queue):  # type: ignore[no-untyped-def]
    v = marks[2 * queue]
    if v != NONE:
        following = after[queue, v] - 1
        marks[2 * queue] = NONE if following == v else following
        after[queue, v] = 0
    return v


@njit(cache=True, nogil=True)
def _grow(nodes, steps, after, marks, v):  # type: ignore[no-untyped-def]
    """Take the free neighbours of an active node into its tree; where the other tree is met, the direction."""
    side = nodes[v].tree
    for d in range(6):
        w = _neighbour(steps, v, d)
        if _room(nodes, v, w, d, side) == 0:
            continue
        if nodes[w].tree == FREE:
            nodes[w].tree = side
            _hang(nodes, w, d ^ 1, v)
            _append(after, marks, 0, w)
        elif nodes[w].tree != side:
            return d
        elif nodes[w].stamp <= nodes[v].stamp and nodes[w].distance > nodes[v].distance:
            _hang(nodes, w, d ^ 1, v)
    return NONE


@njit(cache=True, nogil=True)
def _hang(nodes, v, d, parent):  # type: ignore[no-untyped-def]
    nodes[v].parent = d
    nodes[v].distance = nodes[parent].distance + 1
    nodes[v].stamp = nodes[parent].stamp


@njit(cache=True, nogil=True)
def _augment(nodes, steps, after, marks, v, d):  # type: ignore[no-untyped-def]
    """Send what passes along the path from root to root through v and its neighbour in the other tree."""
    w = _neighbour(steps, v, d)
    side = nodes[v].tree
    flow = min(_passes(nodes, steps, v), _passes(nodes, steps, w), _room(nodes, v, w, d, side))
    _carry(nodes, v, w, d, flow, side)
    _send(nodes, steps, after, marks, v, flow)
    _send(nodes, steps, after, marks, w, flow)


@njit(cache=True, nogil=True)
def _carry(nodes, parent, child, d, flow, side):  # type: ignore[no-untyped-def]
    """Send flow from a parent to its child in direction d, or in the sink's tree from the child to the parent."""
    change = flow if side == SOURCE else -flow
    nodes[parent].capacity[d] -= change
    nodes[child].capacity[d ^ 1] += change


@njit(cache=True, nogil=True)
def _passes(nodes, steps, v):  # type: ignore[no-untyped-def]
    """How much passes between v and its root."""
    side, flow = nodes[v].tree, FAR
    while nodes[v].parent != ROOT:
        d = nodes[v].parent
        w = _neighbour(steps, v, d)
        flow = min(flow, _room(nodes, w, v, d ^ 1, side))
        v = w
    return min(flow, abs(np.int64(nodes[v].excess)))


@njit(cache=True, nogil=True)
def _send(nodes, steps, after, marks, v, flow):  # type: ignore[no-untyped-def]
    """Send flow between v and its root; what this cuts off is orphaned."""
    side = nodes[v].tree
    while nodes[v].parent != ROOT:
        d = nodes[v].parent
        w = _neighbour(steps, v, d)
        _carry(nodes, w, v, d ^ 1, flow, side)
        if _room(nodes, w, v, d ^ 1, side) == 0:
            _orphan(nodes, after, marks, v)
        v = w
    nodes[v].excess -= flow if side == SOURCE else -flow
    if nodes[v].excess == 0:
        _orphan(nodes, after, marks, v)


@njit(cache=True, nogil=True)
def _orphan(nodes, after, marks, v):  # type: ignore[no-untyped-def]
    nodes[v].parent = ORPHAN
    _append(after, marks, 1, v)


@njit(cache=True, nogil=True)
def _adopt(nodes, steps, after, marks):  # type: ignore[no-untyped-def]
    """Give every orphan the neighbour nearest a root as parent, or set it free, and its children are orphans too."""
    marks[4] += 1
    v = _pop(after, marks, 1)
    while v != NONE:
        side, chosen, least = nodes[v].tree, NONE, FAR
        for d in range(6):
            w = _neighbour(steps, v, d)
            if nodes[w].tree == side and _room(nodes, w, v, d ^ 1, side) > 0:
                distance = _distance_to_root(nodes, steps, marks[4], w)
                if distance < least:
                    chosen, least = d, distance
        if chosen == NONE:
            _set_free(nodes, steps, after, marks, v)
        else:
            _hang(nodes, v, chosen, _neighbour(steps, v, chosen))
        v = _pop(after, marks, 1)


@njit(cache=True, nogil=True)
def _set_free(nodes, steps, after, marks, v):  # type: ignore[no-untyped-def]
    side = nodes[v].tree
    for d in range(6):
        w = _neighbour(steps, v, d)
        if nodes[w].tree != side:
            continue
        if _room(nodes, w, v, d ^ 1, side) > 0:
            _append(after, marks, 0, w)
        if nodes[w].parent == d ^ 1:
            _orphan(nodes, after, marks, w)
    nodes[v].tree = FREE


@njit(cache=True, nogil=True)
def _distance_to_root(nodes, steps, now, v):  # type: ignore[no-untyped-def]
    """Nodes from v to its root, or FAR where an orphan stands between them."""
    first, above = v, 0
    while nodes[v].stamp != now:
        up = nodes[v].parent
        if up == ORPHAN:
            return FAR
        if up == ROOT:
            nodes[v].stamp = now
            nodes[v].distance = 1
        else:
            above += 1
            v = _neighbour(steps, v, up)
    found = above + nodes[v].distance
    distance, v = found, first
    while nodes[v].stamp != now:
        nodes[v].stamp = now
        nodes[v].distance = distance
        distance -= 1
        v = _neighbour(steps, v, nodes[v].parent)
    return found
