"""Warps between any two sections of a stack, composed from registrations of neighbours or made directly.

A section that is blank or torn is no link of a chain: the sections around it are registered with one another. A blank
one stands where the nearest other section stands; a torn one is registered with that alone.

Chained: each section is registered to the next; the warp over a longer gap follows the chain. On the mouse stack this
beat one jump from labelled section to target. The fields are kept on a coarse grid (twice the finest registration
level), where composing them costs next to nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.registration import affine
from limner.registration.section_pairs import AS_IS, FLIPS
from limner.registration.velocity_field import Options, register
from limner.registration.warp import Spacing2D, compose, resize_displacement

PAIRS_AT_ONCE = 32
CHAINED_KEPT = 512  # fields on the coarse grid


@dataclass(frozen=True)
class SectionWarps:
    """Displacements between sections of a stack.

    Parameters
    ----------
    fields : mapping of (int, int) to Tensor
        For a pair (z, a): from section z to its match in section a, shape (1, 2, y, x), mm, on a coarse grid.
    shape : tuple of int
        Size (Y, X) of the sections.
    spacing : tuple of float
        Spacing (y, x) of the coarse grid, mm.
    unmatched : tuple of (int, int)
        Pairs that hold an empty or constant section; their displacement is zero.
    anchors : mapping of int to int
        For each section that is no link of the chain the one that is to go by; see `links`.
    """

    fields: dict[tuple[int, int], Tensor]
    shape: tuple[int, int]
    spacing: Spacing2D
    unmatched: tuple[tuple[int, int], ...] = ()
    anchors: Mapping[int, int] = field(default_factory=dict)
    _chained: Callable[[tuple[int, ...]], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # a section's atlases lie along two chains, and each is asked for several times
        object.__setattr__(self, "_chained", lru_cache(maxsize=CHAINED_KEPT)(self._along))

    def displacement(self, z: int, atlas: int) -> Tensor:
        """From section `z` to section `atlas`, (1, 2, Y, X), mm: direct where there is such a pair, else chained."""
        if (z, atlas) in self.fields:
            return resize_displacement(self.fields[z, atlas], self.shape)
        route = self._route(z, atlas)
        found = self._chained(route[:1])
        for steps in range(2, len(route) + 1):
            found = self._chained(route[:steps])  # the one before is kept, so that this is one step
        return resize_displacement(found, self.shape)

    def _along(self, route: tuple[int, ...]) -> Tensor:
        if len(route) == 1:
            return torch.zeros_like(next(iter(self.fields.values()))) if self.fields else torch.zeros(1, 2, 1, 1)
        before, last = self._chained(route[:-1]), (route[-2], route[-1])
        # no step leads to or from a blank section
        return compose(before, self.fields[last], self.spacing) if last in self.fields else before

    def _route(self, z: int, atlas: int) -> tuple[int, ...]:
        """The sections from one to the other along the chain, without those that are no links of it."""
        if z == atlas:
            return (z,)
        begin, end = self.anchors.get(z, z), self.anchors.get(atlas, atlas)
        towards = 1 if end > begin else -1
        chain = [at for at in range(begin, end + towards, towards) if at not in self.anchors] if begin != end else [end]
        return (*[z] * (z != begin), *chain, *[atlas] * (atlas != end))

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` needs, as arrays that can be stored."""
        pairs = sorted(self.fields)
        return {
            "pairs": np.asarray(pairs, dtype=np.int64).reshape(-1, 2),
            "fields": torch.cat([self.fields[p] for p in pairs]).numpy()
            if pairs
            else np.zeros((0, 2, 1, 1), np.float32),
            "unmatched": np.asarray(self.unmatched, dtype=np.int64).reshape(-1, 2),
            "anchors": np.asarray(sorted(self.anchors.items()), dtype=np.int64).reshape(-1, 2),
            "geometry": np.asarray([*self.shape, *self.spacing], dtype=np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> SectionWarps:
        """The inverse of `to_arrays`."""
        pairs = [(int(a), int(b)) for a, b in arrays["pairs"].tolist()]
        fields = {pair: torch.from_numpy(np.asarray(f))[None] for pair, f in zip(pairs, arrays["fields"], strict=True)}
        height, width, step_y, step_x = arrays["geometry"].tolist()
        unmatched = tuple((int(a), int(b)) for a, b in arrays["unmatched"].tolist())
        anchors = {int(z): int(at) for z, at in arrays["anchors"].tolist()}
        return cls(fields, (int(height), int(width)), (step_y, step_x), unmatched, anchors)


def links(n: int, blank: Sequence[int], torn: Sequence[int]) -> tuple[list[tuple[int, int]], dict[int, int]]:
    """Pairs of sections to be registered for a chain that passes over blank and torn ones.

    Parameters
    ----------
    n : int
        Number of sections.
    blank, torn : sequence of int
        Those that are no links of the chain.

    Returns
    -------
    pairs : list of (int, int)
        Each section and the one before it in the chain; each torn section and its anchor.
    anchors : dict of int to int
        For each blank or torn section the nearest other one, the earlier of two; empty where there is none.

    Examples
    --------
    >>> links(5, blank=[2], torn=[4])
    ([(1, 0), (3, 1), (4, 3)], {2: 1, 4: 3})
    """
    out = {*blank, *torn}
    chain = [z for z in range(n) if z not in out]
    if not chain:
        return [], {}
    anchors = {z: min(chain, key=lambda at: (abs(at - z), at)) for z in sorted(out)}
    pairs = [(after, before) for before, after in pairwise(chain)]
    return pairs + [(z, anchors[z]) for z in sorted(set(torn) - set(blank))], anchors


def register_sections(
    sections: NDArray[np.float32],
    pairs: Sequence[tuple[int, int]],
    spacing: Spacing2D,
    *,
    options: Options | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
    orientations: Mapping[int, int] | None = None,
    anchors: Mapping[int, int] | None = None,
) -> SectionWarps:
    """Register pairs of sections in batches.

    Parameters
    ----------
    sections : ndarray
        The stack, shape (Z, C, Y, X).
    pairs : sequence of (int, int)
        Pairs (z, a); each is registered once and gives both directions.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    options, device
        As for `register`.
    progress : callable, optional
        Called with the number of pairs done and of all pairs.
    orientations : mapping of int to int, optional
        Sections that are turned or mirrored, and which of `limner.registration.section_pairs.FLIPS` they are. They are
        registered the right way round; displacements lead to and from them as they are.
    anchors : mapping of int to int, optional
        As of `SectionWarps`.

    Returns
    -------
    SectionWarps
    """
    turned = {z: FLIPS[o] for z, o in (orientations or {}).items() if o != AS_IS}
    options = options or Options()
    shape = (sections.shape[2], sections.shape[3])
    shrink = max(1.0, max(shape) / (2 * options.finest_pixels))
    coarse = (max(2, round(shape[0] / shrink)), max(2, round(shape[1] / shrink)))
    step = (spacing[0] * shape[0] / coarse[0], spacing[1] * shape[1] / coarse[1])
    fields: dict[tuple[int, int], Tensor] = {}
    unmatched: list[tuple[int, int]] = []

    def reduced(indices: Sequence[int]) -> Tensor:
        chosen = torch.from_numpy(sections[list(indices)]).to(device)
        for i, z in enumerate(indices):
            chosen[i] = chosen[i].flip(
                [axis for axis, factor in zip((1, 2), turned.get(z, (1, 1)), strict=True) if factor < 0]
            )
        small = F.interpolate(chosen, size=coarse, mode="bilinear", align_corners=False, antialias=True)
        return small[:, 0] if small.shape[1] == 1 else small.permute(0, 2, 3, 1)

    for begin in range(0, len(pairs), PAIRS_AT_ONCE):
        batch = list(pairs[begin : begin + PAIRS_AT_ONCE])
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # told by `unmatched`
            found = register(
                reduced([z for z, _ in batch]),
                reduced([a for _, a in batch]),
                step,
                options=options,
                device=device,
            )
        for i, (z, a) in enumerate(batch):
            flips = turned.get(z, (1, 1)), turned.get(a, (1, 1))
            fields[z, a] = _as_given(found.displacement[i : i + 1].cpu(), step, *flips)
            fields[a, z] = _as_given(found.inverse_displacement[i : i + 1].cpu(), step, *flips[::-1])
            if not found.matched[i]:
                unmatched.append((z, a))
        progress(begin + len(batch), len(pairs))
    return SectionWarps(fields, shape, step, tuple(unmatched), dict(anchors or {}))


def _as_given(displacement: Tensor, spacing: Spacing2D, own: tuple[int, int], other: tuple[int, int]) -> Tensor:
    """A displacement between sections that were flipped about their middle, as one between them as they are."""
    if own == other == (1, 1):
        return displacement
    points = affine.centred_points((displacement.shape[2], displacement.shape[3]), spacing, displacement.device)
    # p lies at own p in the flipped section, where the field is read; it leads to other q
    there = displacement.flip([axis for axis, factor in zip((2, 3), own, strict=True) if factor < 0])
    own_sign, other_sign = (torch.tensor(flip, dtype=torch.float32).view(1, 2, 1, 1) for flip in (own, other))
    return other_sign * (own_sign * points + there) - points
