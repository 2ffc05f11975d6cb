"""Warps between any two sections of a stack, composed from registrations of neighbours or made directly.

Chained: each section is registered to the next; the warp over a longer gap follows the chain. On the mouse stack this
beat one jump from labelled section to target. The fields are kept on a coarse grid (twice the finest registration
level), where composing them costs next to nothing.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import lru_cache

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional as F

from limner.registration.velocity_field import Options, Start, register
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
    """

    fields: dict[tuple[int, int], Tensor]
    shape: tuple[int, int]
    spacing: Spacing2D
    unmatched: tuple[tuple[int, int], ...] = ()
    _chained: Callable[[int, int], Tensor] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        # a section's atlases lie along two chains, and each is asked for several times
        object.__setattr__(self, "_chained", lru_cache(maxsize=CHAINED_KEPT)(self._chain))

    def displacement(self, z: int, atlas: int) -> Tensor:
        """From section `z` to section `atlas`, (1, 2, Y, X), mm: direct where there is such a pair, else chained."""
        if (z, atlas) in self.fields:
            return resize_displacement(self.fields[z, atlas], self.shape)
        towards = 1 if atlas > z else -1
        found = self._chained(z, z)
        for at in range(z + towards, atlas + towards, towards) if atlas != z else ():
            found = self._chained(z, at)  # the one before is kept, so that this is one step
        return resize_displacement(found, self.shape)

    def _chain(self, z: int, atlas: int) -> Tensor:
        if atlas == z:
            return torch.zeros_like(next(iter(self.fields.values()))) if self.fields else torch.zeros(1, 2, 1, 1)
        before = atlas - 1 if atlas > z else atlas + 1
        return compose(self._chained(z, before), self.fields[before, atlas], self.spacing)

    def to_arrays(self) -> dict[str, NDArray[np.generic]]:
        """What `from_arrays` needs, as arrays that can be stored."""
        pairs = sorted(self.fields)
        return {
            "pairs": np.asarray(pairs, dtype=np.int64).reshape(-1, 2),
            "fields": torch.cat([self.fields[p] for p in pairs]).numpy()
            if pairs
            else np.zeros((0, 2, 1, 1), np.float32),
            "unmatched": np.asarray(self.unmatched, dtype=np.int64).reshape(-1, 2),
            "geometry": np.asarray([*self.shape, *self.spacing], dtype=np.float64),
        }

    @classmethod
    def from_arrays(cls, arrays: dict[str, NDArray[np.generic]]) -> SectionWarps:
        """The inverse of `to_arrays`."""
        pairs = [(int(a), int(b)) for a, b in arrays["pairs"].tolist()]
        fields = {pair: torch.from_numpy(np.asarray(f))[None] for pair, f in zip(pairs, arrays["fields"], strict=True)}
        height, width, step_y, step_x = arrays["geometry"].tolist()
        unmatched = tuple((int(a), int(b)) for a, b in arrays["unmatched"].tolist())
        return cls(fields, (int(height), int(width)), (step_y, step_x), unmatched)


def register_sections(
    sections: NDArray[np.float32],
    pairs: Sequence[tuple[int, int]],
    spacing: Spacing2D,
    *,
    start: Start = "affine",
    options: Options | None = None,
    device: str = "cpu",
    progress: Callable[[int, int], None] = lambda *_: None,
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
    start, options, device
        As for `register`.
    progress : callable, optional
        Called with the number of pairs done and of all pairs.

    Returns
    -------
    SectionWarps
    """
    options = options or Options()
    shape = (sections.shape[2], sections.shape[3])
    shrink = max(1.0, max(shape) / (2 * options.finest_pixels))
    coarse = (max(2, round(shape[0] / shrink)), max(2, round(shape[1] / shrink)))
    step = (spacing[0] * shape[0] / coarse[0], spacing[1] * shape[1] / coarse[1])
    fields: dict[tuple[int, int], Tensor] = {}
    unmatched: list[tuple[int, int]] = []

    def reduced(indices: Sequence[int]) -> Tensor:
        chosen = torch.from_numpy(sections[list(indices)]).to(device)
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
                start=start,
                options=options,
                device=device,
            )
        for i, (z, a) in enumerate(batch):
            fields[z, a] = found.displacement[i : i + 1].cpu()
            fields[a, z] = found.inverse_displacement[i : i + 1].cpu()
            if not found.matched[i]:
                unmatched.append((z, a))
        progress(begin + len(batch), len(pairs))
    return SectionWarps(fields, shape, step, tuple(unmatched))
