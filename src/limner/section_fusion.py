"""What the labelled sections say about any section of a stack: warped onto it, fused, as log probabilities."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import product
from typing import Any, Literal, Protocol

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limner.annotations import SectionLabels
from limner.intensity import to_8_bit
from limner.label_fusion import (
    Interpolation,
    atlas_log_weights,
    fuse,
    interpolation_weights,
    local_shares,
)
from limner.registration.label_flow import Options, few, follow, label_velocity
from limner.registration.section_warps import SectionWarps
from limner.registration.stack_alignment import Inspection
from limner.registration.warp import compose, covers, warp
from limner.structure_distances import StructureDistances
from limner.tiled_evidence import Tile, TiledEvidence, log_total, pixels_inside
from limner.volume import Volume

PAPER_RHO = 21.0  # 1 / mm
SMALLEST_SHARE = 1e-9
MANY = 32  # with more structures than this a section is fused tile by tile
TILE = 32  # pixels along y and x


@dataclass(frozen=True)
class FusionOptions:
    """How labelled sections are fused.

    Parameters
    ----------
    fusion : {'blended', 'normalised', 'printed'}
        Signed distances blended along z, or a mixture over atlases, each one's odds normalised, or Eq. 4 as printed.
    interpolation : {'linear', 'catmull-rom'}
        How 'blended' weighs labelled sections.
    label_flow : bool
        Whether 'blended' carries the two neighbours' labels towards each other by what registration left between them.
    rho : float
        LogOdds per mm; 0: ``rho_scale / spread`` for 'blended', else the paper's 21.
    sigma : float
        Standard deviation of 8-bit grey levels.
    alpha : float
        Decay with distance, per mm.
    clip_mm : float
        Signed distances beyond this are cut, mm.
    """

    fusion: Literal["blended", "normalised", "printed"] = "blended"
    interpolation: Interpolation = "catmull-rom"
    rho: float = 0.0
    sigma: float = 20.0
    alpha: float = 1.0
    clip_mm: float = 1.0
    label_flow: bool = True


class Beside(Protocol):
    """Something else that speaks for sections, as `limner.mirror_image.MirrorImage`."""

    def joined(self, z: int, left_out: int | None, structures: Sequence[int], mean: Tensor) -> Tensor:
        """Signed distances (L, Y, X), mm: those blended from labelled sections, and its own."""

    def inputs(self, z: int) -> list[Any]:
        """What `joined` depends on, beyond what fusion itself does."""


@dataclass
class SectionFusion:
    """The sections, what is known of them, and the warps between them.

    Every method takes `left_out`: a labelled section to be treated as if it had no labels, for fitting and calibration.

    Parameters
    ----------
    images : ndarray of float32
        8-bit grey levels, shape (Z, C, Y, X).
    labels : ndarray of int
        Shape (Z, Y, X); only `labelled` sections are read.
    labelled : tuple of int
        Labelled sections, increasing.
    positions : ndarray of float
        Position of each section, shape (Z,), mm, increasing.
    spacing : tuple of float
        Pixel spacing (y, x), mm.
    options : FusionOptions
        How to fuse.
    device : str
        Where to compute.
    warps : SectionWarps, optional
        Between sections; None: they lie alike already.
    rho_scale : float
        rho is this over `spread`; see `limner.fusion_scale.fitted_rho`. Unit: LogOdds per mm, times sqrt(mm).
    flows : dict of (int, int) to Tensor
        Those of `flow` that were found before; others are found when they are asked for.
    inspection : Inspection, optional
        What is wrong with which sections; None: not looked for.
    beside : Beside, optional
        What else is asked, where a section has at most `MANY` structures.
    """

    images: NDArray[np.float32]
    labels: NDArray[Any]
    labelled: tuple[int, ...]
    positions: NDArray[np.float64]
    spacing: tuple[float, float]
    options: FusionOptions
    device: str = "cpu"
    warps: SectionWarps | None = None
    rho_scale: float = math.nan
    flows: dict[tuple[int, int], Tensor] = field(default_factory=dict)
    inspection: Inspection | None = None
    beside: Beside | None = None

    @classmethod
    def of_stack(cls, images: Volume, annotations: SectionLabels, options: FusionOptions, device: str) -> SectionFusion:
        """The fusion of a stack that is not registered yet, its grey levels mapped to 8 bit."""
        levels = to_8_bit(images.pixels)
        channels = levels[:, None] if levels.ndim == 3 else np.moveaxis(levels, -1, 1)
        return cls(
            np.ascontiguousarray(channels),
            annotations.label_map.labels.astype(np.int32, copy=False),
            annotations.labelled,
            images.space.section_positions,
            (images.space.spacing[1], images.space.spacing[2]),
            options,
            device,
        )

    def __post_init__(self) -> None:
        self.distances = lru_cache(maxsize=8)(self._distances)

    def _distances(self, z: int) -> StructureDistances:
        """Signed distances to the structures of a labelled section."""
        return StructureDistances.of(self.labels[z], self.spacing, self.options.clip_mm, self.device)

    def neighbours(self, z: int, left_out: int | None = None) -> list[int]:
        """The nearest labelled sections before and after `z`, or the one there is."""
        known = [a for a in self.labelled if a not in (left_out, z)]
        return [*[a for a in known if a < z][-1:], *[a for a in known if a > z][:1]]

    def atlases(self, z: int, left_out: int | None = None) -> list[tuple[int, float]]:
        """Labelled sections that speak for `z`, with their interpolation weights."""
        if self.options.fusion != "blended":
            return [(a, 1.0) for a in self.neighbours(z, left_out)]
        known = [a for a in self.labelled if a not in (left_out, z)]
        kind = self.options.interpolation
        chosen = interpolation_weights(self.positions[known].tolist(), float(self.positions[z]), kind)
        return [(known[i], w) for i, w in chosen]

    def spread(self, z: int, left_out: int | None = None) -> float:
        """How far a border may have wandered at `z`: that of a Brownian bridge between its neighbours, sqrt(mm)."""
        gaps = [abs(float(self.positions[a] - self.positions[z])) for a in self.neighbours(z, left_out)]
        return math.sqrt(math.prod(gaps) / sum(gaps) if len(gaps) == 2 else gaps[0])

    @property
    def shape(self) -> tuple[int, int]:
        """Size (Y, X) of the sections."""
        return self.images.shape[2], self.images.shape[3]

    def log_frequency(self, z: int, left_out: int | None = None) -> Tensor:
        """log frequency of each of `structures` on the nearest labelled sections, (L, 1, 1)."""
        labels = self.labels[self.neighbours(z, left_out)]
        counts = [float((labels == s).sum()) + 1 for s in self.structures(z, left_out)]
        return (torch.tensor(counts, device=self.device) / sum(counts)).log()[:, None, None]

    def typical_spread(self) -> float:
        """Median of `spread` over the unlabelled sections, sqrt(mm)."""
        return float(np.median([self.spread(z) for z in range(len(self.images)) if z not in self.labelled]))

    def labelled_near(self, z: int) -> list[int]:
        """Labelled sections that can speak for `z` when it or any other is left out: three each way."""
        before, after = [a for a in self.labelled if a < z], [a for a in self.labelled if a > z]
        return before[-3:] + after[:3]

    @property
    def misleading(self) -> frozenset[int]:
        """Sections that a network must not be shown: blank, turned or mirrored."""
        return frozenset() if self.inspection is None else self.inspection.misleading

    def inputs(self, z: int) -> list[Any]:
        """Everything that `evidence` depends on, beyond options and scales: to tell when it must be made anew."""
        atlases = self.atlases(z)
        warps = [self.displacement(z, a).cpu().numpy() for a, _ in atlases]
        looked_at: list[Any] = []
        neighbours = self.neighbours(z)
        if self.options.label_flow and self.options.fusion == "blended" and len(neighbours) == 2:
            looked_at = [f.cpu().numpy() for f in (self.flow(*neighbours), self.displacement(*neighbours))]
        if self.options.fusion != "blended":  # these compare grey levels, and decay with distance
            looked_at = [(self.images[a], float(self.positions[a] - self.positions[z])) for a, _ in atlases]
        if self.beside is not None:
            looked_at += self.beside.inputs(z)
        return [self.images[z], self.spread(z), *atlases, *(self.labels[a] for a, _ in atlases), *warps, *looked_at]

    def structures(self, z: int, left_out: int | None = None) -> list[int]:
        """The L labels that occur on any atlas of `z`, increasing; background is one of them."""
        return sorted({0, *(s for a, _ in self.atlases(z, left_out) for s in self.distances(a).structures)})

    def blended_distances(self, z: int, left_out: int | None = None) -> tuple[Tensor, Tensor, Tensor]:
        """Warped distances (N, L, Y, X), their weights (N,) and where each covers the section (N, Y, X)."""
        structures = self.structures(z, left_out)
        warped, covered, weights = [], [], []
        for atlas, weight, displacement in self._shares(z, left_out):
            warped.append(warp(self.distances(atlas).dense(structures)[None], displacement, self.spacing)[0])
            covered.append(covers(displacement, self.spacing)[0, 0])
            weights.append(weight)
        return torch.stack(warped), torch.tensor(weights, device=self.device), torch.stack(covered)

    def blended_tiles(
        self, z: int, left_out: int | None, pixels: Tensor | None = None
    ) -> Iterator[tuple[slice, slice, Tensor, Tensor, Tensor]]:
        """Signed distances blended along z, tile by tile, of the structures that any atlas has near the tile.

        Yields the tile's rows and columns, indices of the structures (l,), with background among them, their distances
        (l, y, x) in mm, and where no atlas reaches (y, x). Any other structure is `clip_mm` away. Tiles that hold none
        of `pixels` (flat indices) are left out.
        """
        structures, (height, width) = self.structures(z, left_out), self.shape
        shares = self._shares(z, left_out)
        covered = torch.stack([covers(displacement, self.spacing)[0, 0] for _, _, displacement in shares])
        local, uncovered = local_shares(torch.tensor([w for _, w, _ in shares], device=self.device), covered)
        place = {s: i for i, s in enumerate(structures)}
        present = [self.distances(a).structures for a, _, _ in shares]
        index = [torch.tensor([place[s] for s in found], device=self.device) for found in present]
        few_of_them = len(structures) <= MANY
        step_y, step_x = (height, width) if few_of_them else (TILE, TILE)
        for top, left in product(range(0, height, step_y), range(0, width, step_x)):
            rows, columns = slice(top, min(top + step_y, height)), slice(left, min(left + step_x, width))
            if pixels is not None and not len(pixels_inside(rows, columns, pixels, width)[0]):
                continue
            found = [self._warped_near(a, displacement, rows, columns) for a, _, displacement in shares]
            near = torch.zeros(len(structures), dtype=torch.bool, device=self.device)
            near[0] = True
            for to, (chosen, _) in zip(index, found, strict=True):
                near[to[chosen]] = True
            if few_of_them:
                near[:] = True
            size = len(found), int(near.sum()), rows.stop - top, columns.stop - left
            distances = torch.full(size, -self.options.clip_mm, device=self.device)
            order = near.cumsum(0) - 1
            for atlas, to, (chosen, warped) in zip(distances, index, found, strict=True):
                atlas[order[to[chosen]]] = warped
            mean = (local[:, None, rows, columns] * distances).sum(dim=0)
            if self.beside is not None and few_of_them:  # the tile is the whole section
                mean = self.beside.joined(z, left_out, structures, mean)
            yield rows, columns, torch.nonzero(near)[:, 0], mean, uncovered[rows, columns]

    def _warped_near(self, atlas: int, displacement: Tensor, rows: slice, columns: slice) -> tuple[Tensor, Tensor]:
        """Indices of a labelled section's structures that are near a tile, (l,), and distances to them (l, y, x)."""
        known = self.distances(atlas)
        moved = displacement[:, :, rows, columns]
        still = not moved.any()
        windows = []
        for along, (at, size) in enumerate(zip((rows, columns), self.shape, strict=True)):
            ahead = moved[0, along] / self.spacing[along]
            first = at.start + (0.0 if still else float(ahead.min()) - 1)
            last = at.stop - 1 + (0.0 if still else float(ahead.max()) + 1)
            begin = min(max(math.floor(first), 0), size - 1)
            windows.append(slice(begin, max(begin, min(math.ceil(last), size - 1)) + 1))
        chosen = known.near(*windows)
        distances = known.at(chosen, *windows)
        if still:
            return chosen, distances
        offset = [(at.start - w.start) * s for at, w, s in zip((rows, columns), windows, self.spacing, strict=True)]
        moved = moved + moved.new_tensor(offset).view(1, 2, 1, 1)
        return chosen, warp(distances[None], moved, self.spacing)[0]

    def _shares(self, z: int, left_out: int | None) -> list[tuple[int, float, Tensor]]:
        """Labelled sections, with what weight and through which displacement each speaks for `z`.

        With a flow the linear share of the two neighbours goes along it; what a cubic has beyond that, which bends the
        course of a border, stays where registration alone carries it.
        """
        plain = [(a, w, self.displacement(z, a)) for a, w in self.atlases(z, left_out)]
        neighbours = self.neighbours(z, left_out)
        if not (self.options.label_flow and self.options.fusion == "blended" and len(neighbours) == 2):
            return plain
        before, after = neighbours
        gap = float(self.positions[after] - self.positions[before])
        t = float(self.positions[z] - self.positions[before]) / gap
        velocity = self.flow(before, after)
        back, on = (follow(velocity, share, self.shape, self.spacing) for share in (-t, 1 - t))
        start = self.displacement(z, before)
        onward = compose(compose(start, on, self.spacing), self.displacement(before, after), self.spacing)
        linear = {before: 1 - t, after: t}
        beyond = [(a, w - linear.get(a, 0.0), displacement) for a, w, displacement in plain]
        along = [(before, 1 - t, compose(start, back, self.spacing)), (after, t, onward)]
        return along + [share for share in beyond if abs(share[1]) > SMALLEST_SHARE]

    def flow(self, before: int, after: int) -> Tensor:
        """What registration leaves between two labelled sections, seen from the first: (1, 2, y, x), mm.

        See `limner.registration.label_flow.label_velocity`.
        """
        if (before, after) not in self.flows:
            known = [self.distances(a) for a in (before, after)]
            structures = sorted({*known[0].structures, *known[1].structures})
            maps = torch.stack([few(one.dense, structures, Options().most) for one in known])
            moved = warp(maps[1:], self.displacement(before, after), self.spacing)[0]
            self.flows[before, after] = label_velocity(maps[0], moved, self.spacing, self.options.clip_mm)
        return self.flows[before, after]

    def flow_pairs(self) -> list[tuple[int, int]]:
        """Pairs whose `flow` is asked for: neighbours, and those around a labelled section that is left out."""
        if not self.options.label_flow or self.options.fusion != "blended":
            return []
        pairs = {(a, b) for step in (1, 2) for a, b in zip(self.labelled, self.labelled[step:], strict=False)}
        return sorted((a, b) for a, b in pairs if b - a > 1)

    def displacement(self, z: int, atlas: int) -> Tensor:
        """From section `z` to a labelled section, (1, 2, Y, X), mm."""
        if self.warps is None:
            return torch.zeros(1, 2, *self.images.shape[2:], device=self.device)
        return self.warps.displacement(z, atlas).to(self.device)

    def evidence(self, z: int, left_out: int | None = None) -> Tensor:
        """log p_f of each of `structures` at each pixel of section `z`: Eq. 4 or its blended form.

        Parameters
        ----------
        z : int
            The section.
        left_out : int, optional
            A labelled section to be treated as if it had no labels.

        Returns
        -------
        Tensor
            Shape (L, Y, X), normalised over L; uniform where no atlas reaches.
        """
        return self.tiled_evidence(z, left_out).dense()

    def tiled_evidence(self, z: int, left_out: int | None = None) -> TiledEvidence:
        """`evidence`, in tiles that tell apart only the structures near them: what it takes grows with these."""
        if self.options.fusion != "blended":
            return TiledEvidence.of_all(self._mixture(z, left_out))
        rho = self.options.rho or (self.rho_scale / self.spread(z, left_out))
        structures, tiles = len(self.structures(z, left_out)), []
        for rows, columns, near, mean, uncovered in self.blended_tiles(z, left_out):
            odds, far = rho * mean, torch.full_like(mean[0], -rho * self.options.clip_mm)
            total = log_total(odds, far, structures - len(near))
            log_p, log_far = (torch.where(uncovered, -math.log(structures), v - total) for v in (odds, far))
            tiles.append(Tile(rows, columns, near, log_p, log_far))
        return TiledEvidence(tiles, structures, self.shape)

    def _mixture(self, z: int, left_out: int | None) -> Tensor:
        """Eq. 4, (L, Y, X)."""
        distances, _, covered = self.blended_distances(z, left_out)
        atlases = [a for a, _ in self.atlases(z, left_out)]
        images = [torch.from_numpy(self.images[a])[None].to(self.device) for a in atlases]
        moved = torch.cat(
            [warp(i, self.displacement(z, a), self.spacing) for i, a in zip(images, atlases, strict=True)]
        )
        gaps = torch.tensor([abs(self.positions[a] - self.positions[z]) for a in atlases], device=self.device)
        section = torch.from_numpy(self.images[z]).to(self.device)
        log_weights = atlas_log_weights(section, moved, gaps.float(), self.options.sigma, self.options.alpha)
        rho = self.options.rho or PAPER_RHO
        return fuse(distances, log_weights, covered, rho, printed=self.options.fusion == "printed")

    def blended_at(self, z: int, left_out: int | None, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """Signed distances blended along z at flat indices, (L, N), mm, and where any atlas reaches (N,)."""
        size = len(self.structures(z, left_out)), len(pixels)
        found = torch.full(size, -self.options.clip_mm, device=self.device)
        covered = torch.zeros(len(pixels), dtype=torch.bool, device=self.device)
        for rows, columns, near, mean, uncovered in self.blended_tiles(z, left_out, pixels):
            inside, row, column = pixels_inside(rows, columns, pixels, self.shape[1])
            found[near[:, None], inside] = mean[:, row, column]
            covered[inside] = ~uncovered[row, column]
        return found, covered
