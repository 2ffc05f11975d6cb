"""What the mirror image of a stack says about its sections, for specimens with two like halves.

A brain is seldom cut quite square, so that the mirror image of a labelled section crosses the sections between the
labelled ones: what is labelled there on the right tells what to expect on the left. `ask_mirror_image` finds how the
stack lies in its mirror image, and keeps it where left-out labelled sections come out better with it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from limner.fusion_scale import fitted_rho
from limner.registration.label_flow import Options, follow, label_velocity
from limner.registration.mirror import Column, carried, fit_reflection, section_points
from limner.registration.warp import Spacing2D, warp
from limner.section_fusion import MANY, SectionFusion

MOST_READ = 5  # of so many consecutive sections each is read for a mirror image; of more, every second and the labelled
ASYMMETRY_FLOW = Options(stiffness=1.0)
MIRROR_PIXELS = 136  # longer side of the sections on which mirror images are made
PLANE_PIXELS, PLANE_SECTIONS = 68, 12  # longer side of images, and about how many, on which the plane is sought
ASYMMETRY = 0.1  # mm: variance of a border in the mirror image, beside that of `SectionFusion.spread`
FEWEST_MIRRORED = 4  # labelled sections between others; of fewer it cannot be told whether mirror images help


def ask_mirror_image(fusion: SectionFusion) -> dict[str, float]:
    """Set rho_scale as `limner.fusion_scale.fitted_rho` finds it, and the mirror image where it helps.

    It is kept if with it the log loss of left-out labelled sections is lower by more than the standard error of the
    difference. The reflection itself, a few numbers for the whole stack, has seen all labelled sections.

    Parameters
    ----------
    fusion : SectionFusion
        Registered; its `beside` and `rho_scale` are set.

    Returns
    -------
    dict
        ``rho_scale``, and ``mirror``, 1 where the mirror image is asked, else 0.
    """
    fusion.beside = None
    fusion.rho_scale, losses = fitted_rho(fusion)
    image = MirrorImage.of(fusion) if len(losses) >= FEWEST_MIRRORED else None
    if image is not None:
        fusion.beside = image
        scale, mirrored = fitted_rho(fusion)
        gain = np.subtract(losses, mirrored)
        if gain.mean() > gain.std(ddof=1) / math.sqrt(len(gain)):
            fusion.rho_scale = scale
        else:
            fusion.beside = None
    return {"rho_scale": fusion.rho_scale, "mirror": float(fusion.beside is not None)}


@dataclass
class MirrorImage:
    """How a stack lies in its mirror image, and what labelled sections say by way of it.

    Parameters
    ----------
    fusion : SectionFusion
        The stack; what it has beside is not asked.
    matrix : Tensor
        Shape (3, 4): from a point to the one that mirrors it, mm; see `limner.registration.mirror`.
    """

    fusion: SectionFusion
    matrix: Tensor

    def __post_init__(self) -> None:
        self.structures = _all_structures(self.fusion)
        self.small = _reduced(self.fusion)
        self.distances = lru_cache(maxsize=64)(self._distances)
        self.asymmetry = lru_cache(maxsize=None)(self._asymmetry)  # of two sections for each that is left out: small
        self.says = lru_cache(maxsize=8)(self._says)

    @classmethod
    def of(cls, fusion: SectionFusion) -> MirrorImage | None:
        """That of a stack; None where it cannot be told.

        With more than `limner.section_fusion.MANY` structures, or fewer than `FEWEST_MIRRORED` sections with labels,
        there is none.
        """
        known = [z for z in fusion.labelled if fusion.labels[z].any()]
        if fusion.options.fusion != "blended" or len(_all_structures(fusion)) > MANY or len(known) < FEWEST_MIRRORED:
            return None
        return cls(fusion, _plane(fusion, known))

    @property
    def spacing(self) -> Spacing2D:
        """Pixel spacing (y, x) of the reduced sections, mm."""
        return self.small.spacing

    def mirrored_points(self, z: int) -> Tensor:
        """Where the pixels of a reduced section lie in the mirror, (3, y, x), mm; without asymmetry."""
        position = float(self.fusion.positions[z])
        return carried(self.matrix, section_points(position, self.small.shape, self.spacing, self.fusion.device))

    def _distances(self, z: int, left_out: int | None) -> Tensor:
        """Signed distances on any section, to all structures: of its labels, else blended along z; (L, y, x), mm."""
        fusion, small = self.fusion, self.small
        if z in fusion.labelled and z != left_out:
            return small.distances(z).dense(self.structures)
        neighbours = fusion.neighbours(z, left_out)
        if fusion.options.label_flow and len(neighbours) == 2:
            fusion.flow(*neighbours)  # found at full size, for both
        found = torch.full((len(self.structures), *small.shape), -fusion.options.clip_mm, device=fusion.device)
        there = small.structures(z, left_out)
        for rows, columns, near, mean, _ in small.blended_tiles(z, left_out):
            found[[self.structures.index(there[i]) for i in near.tolist()], rows, columns] = mean
        return found

    def _asymmetry(self, z: int, left_out: int | None) -> Tensor:
        """What the matrix leaves of a labelled section: velocity (1, 2, y, x), mm, as of `label_velocity`."""
        there = self.mirrored_points(z)
        maps = self.distances(z, None), self.column(there, left_out)[0].at(there)
        return label_velocity(*maps, self.spacing, self.fusion.options.clip_mm, ASYMMETRY_FLOW)

    def column(self, points: Tensor, left_out: int | None = None) -> tuple[Column, Column]:
        """Distances, and how far borders may have wandered (mm), on the sections around points."""
        fusion = self.fusion
        last = len(fusion.positions) - 1
        first = min(max(int(np.searchsorted(fusion.positions, float(points[0].min()))) - 1, 0), last)
        end = min(max(int(np.searchsorted(fusion.positions, float(points[0].max()))), first) + 1, last) + 1
        step = 1 if end - first <= MOST_READ else 2  # what is blended changes little from one to the next
        chosen = sorted({*range(first - first % step, end, step), *(a for a in fusion.labelled if first <= a < end)})
        at = torch.tensor(fusion.positions[chosen], dtype=torch.float32, device=fusion.device)
        distances, variance = [], []
        for z in chosen:
            speaks = {z, *(a for a, _ in fusion.atlases(z))}
            distances.append(self.distances(z, left_out if left_out in speaks else None))
            variance.append(0.0 if z in fusion.labelled and z != left_out else fusion.spread(z, left_out) ** 2)
        everywhere = torch.tensor(variance, device=fusion.device).view(-1, 1, 1, 1).expand(-1, 1, *self.small.shape)
        return Column(torch.stack(distances), at, self.spacing), Column(everywhere, at, self.spacing)

    def _says(self, z: int, left_out: int | None) -> tuple[Tensor, Tensor]:
        """What the mirror image says of a section: distances (L, y, x), mm, and variance of borders (1, y, x), mm."""
        shape, fusion, points = self.small.shape, self.fusion, self.mirrored_points(z)
        near = [a for a in fusion.neighbours(z, left_out) if fusion.labels[a].any()]
        if near:
            at = float(np.interp(fusion.positions[z], fusion.positions[near], np.arange(len(near))))
            before, after = (self.asymmetry(a, left_out) for a in (near[0], near[-1]))
            velocity = (1 - at) * before + at * after
            points = warp(points[None], follow(velocity, 1.0, shape, self.spacing), self.spacing)[0]
        distances, variance = self.column(points, left_out)
        found = variance.at(points) + ASYMMETRY
        return distances.at(points), torch.where(distances.holds(points), found, torch.inf)

    def joined(self, z: int, left_out: int | None, structures: Sequence[int], mean: Tensor) -> Tensor:
        """Mean of blended distances and those of the mirror image, each weighed by its inverse variance; (L, Y, X)."""
        distances, variance = self.says(z, left_out)
        own = self.fusion.spread(z, left_out) ** 2
        chosen = distances[[self.structures.index(s) for s in structures]]
        both = torch.cat([chosen, own / (own + variance)])[None]
        enlarged = F.interpolate(both, size=self.fusion.shape, mode="bilinear", align_corners=False)[0]
        return torch.lerp(mean, enlarged[:-1], enlarged[-1:])

    def inputs(self, z: int) -> list[object]:
        """What `joined` depends on, beyond what fusion itself does."""
        return [found.cpu().numpy() for found in self.says(z, None)]


def _all_structures(fusion: SectionFusion) -> list[int]:
    """The labels of all labelled sections, increasing; background is one of them."""
    return sorted({0, *(s for a in fusion.labelled for s in np.unique(fusion.labels[a]).tolist())})


def _reduced(fusion: SectionFusion) -> SectionFusion:
    """The same on sections of `MIRROR_PIXELS`, for what is smooth; without images."""
    height, width = fusion.shape
    shrink = max(1.0, max(height, width) / MIRROR_PIXELS)
    shape = (max(1, round(height / shrink)), max(1, round(width / shrink)))
    rows, columns = (((np.arange(m) + 0.5) * n / m).astype(int) for m, n in zip(shape, fusion.shape, strict=True))
    return replace(
        fusion,
        images=np.broadcast_to(np.float32(0), (len(fusion.images), 1, *shape)),
        labels=fusion.labels[:, rows[:, None], columns],
        spacing=(fusion.spacing[0] * height / shape[0], fusion.spacing[1] * width / shape[1]),
        warps=None if fusion.warps is None else replace(fusion.warps, shape=shape),
        beside=None,
    )


def _plane(fusion: SectionFusion, known: Sequence[int]) -> Tensor:
    """The reflection under which the images are most like their mirror image, (3, 4); sought at some sections."""
    height, width = fusion.shape
    shrink = max(1.0, max(height, width) / PLANE_PIXELS)
    shape = (max(2, round(height / shrink)), max(2, round(width / shrink)))
    spacing = (fusion.spacing[0] * height / shape[0], fusion.spacing[1] * width / shape[1])
    small = [F.interpolate(torch.from_numpy(i)[None], size=shape, mode="area")[0] / 255 for i in fusion.images]
    levels = torch.stack(small).to(fusion.device)
    images = Column(levels, torch.tensor(fusion.positions, dtype=torch.float32, device=fusion.device), spacing)
    chosen = known[:: max(1, len(known) // PLANE_SECTIONS)]
    sections = [(section_points(float(fusion.positions[z]), shape, spacing, fusion.device), levels[z]) for z in chosen]
    middle = np.mean([np.nonzero(fusion.labels[z])[1].mean() for z in known]) - (width - 1) / 2
    return fit_reflection(sections, lambda _: images, float(middle) * fusion.spacing[1]).to(fusion.device)
