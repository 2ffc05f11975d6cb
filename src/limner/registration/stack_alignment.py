"""Sections of a stack that each lie differently: what is wrong with them, and the rigid transforms that align them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.ndimage import binary_opening
from skimage.filters import threshold_otsu
from torch import Tensor

from limner.registration.section_pairs import AS_IS, LEFT_TO_RIGHT, TOP_TO_BOTTOM, TURNED, fit_pairs, refine_pairs
from limner.registration.section_poses import find_orientations, misfit, solve_poses, to_matrices
from limner.registration.section_resampling import small_section
from limner.registration.velocity_field import in_unit_range
from limner.registration.warp import Spacing2D

WORKING_PIXELS = 136  # longer side; twice as many were no better on the mouse stack
PLACED_ANGLE = 21.0  # degrees; two sections may be twice as far apart, as registration finds
BLANK_SHARE = 0.1  # of the neighbours' tissue, below which a section is blank
LOOKED_AT = 2  # neighbours each way that say how much tissue to expect
TORN = 0.15  # nats by which a section's neighbours fit one another better than either fits it
TORN_AT_END = 0.7  # the same of the first and last section, seen from one side; 0.6 at most on a real, sound stack
UNUSUAL = 5.0  # deviations beyond what is usual in the stack
WORDS = {
    TURNED: "turned by 180 degrees",
    LEFT_TO_RIGHT: "mirrored left to right",
    TOP_TO_BOTTOM: "mirrored top to bottom",
}


@dataclass(frozen=True)
class Inspection:
    """What registration of neighbours says about the sections of a stack.

    Parameters
    ----------
    blank : tuple of int
        Sections without tissue, where their neighbours have some.
    torn : tuple of int
        Sections that fit neither neighbour, while these fit one another: torn, folded, or of another specimen. A first
        or last one fits its neighbour worse than this fits the next section but one.
    orientations : ndarray of int
        Of `limner.registration.section_pairs.FLIPS` the one that each section has, where that is certain, shape (Z,).
    fit : ndarray of float
        Mean correlation with the neighbours in tissue and background, shape (Z,); NaN where blank or alone.
    pairs : ndarray of int
        Registered sections, fixed and moving, shape (K, 2).
    matrices : ndarray
        Their transforms, shape (K, 2, 3), mm, as of `limner.registration.section_pairs`.
    correlation : ndarray
        Of each pair, shape (K,).
    """

    blank: tuple[int, ...]
    torn: tuple[int, ...]
    orientations: NDArray[np.int64]
    fit: NDArray[np.float64]
    pairs: NDArray[np.int64]
    matrices: NDArray[np.float64]
    correlation: NDArray[np.float64]

    @property
    def misleading(self) -> frozenset[int]:
        """Sections whose pixels are not where, or not what, those of their neighbours are: blank, turned, mirrored."""
        return frozenset({*self.blank, *np.flatnonzero(self.orientations).tolist()})

    def to_arrays(self) -> dict[str, NDArray[Any]]:
        """What `from_arrays` needs, as arrays that can be stored."""
        whole = {name: np.asarray(getattr(self, name), np.int64) for name in ("blank", "torn", "orientations", "pairs")}
        return whole | {name: getattr(self, name) for name in ("fit", "matrices", "correlation")}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]]) -> Inspection:
        """The inverse of `to_arrays`."""
        values: dict[str, Any] = dict(arrays)
        return cls(**values | {name: tuple(values[name].tolist()) for name in ("blank", "torn")})

    def faults(self) -> dict[int, str]:
        """What is wrong with which section, in words."""
        turned = {int(z): WORDS[int(self.orientations[z])] for z in np.flatnonzero(self.orientations)}
        torn = dict.fromkeys(self.torn, "torn or folded (it fits neither neighbour, but they fit one another)")
        sound = np.setdiff1d(np.arange(len(self.fit)), self.blank).tolist()
        for end in {*sound[:1], *sound[-1:]} & {*self.torn}:
            torn[end] = "torn or folded (its neighbour fits the sections beyond far better)"
        return dict(sorted({**turned, **torn, **dict.fromkeys(self.blank, "blank")}.items()))


def consequence(fault: str) -> str:
    """What a fault, in the words of `Inspection.faults`, means for the labels of its section."""
    if fault == "blank":
        return "its labels rest on its neighbours alone"
    if fault in WORDS.values():
        return "it was registered the right way round; `limner stack align` sets it right"
    return "registration passes it over; look at its labels"


def working_grid(shape: tuple[int, int], spacing: Spacing2D) -> tuple[tuple[int, int], Spacing2D]:
    """Shape and spacing of sections reduced to `WORKING_PIXELS`, or as they are where they have no more."""
    shrink = max(1.0, max(shape) / WORKING_PIXELS)
    small = (max(2, round(shape[0] / shrink)), max(2, round(shape[1] / shrink)))
    return small, (spacing[0] * shape[0] / small[0], spacing[1] * shape[1] / small[1])


def find_blank(foreground: NDArray[np.float32]) -> tuple[int, ...]:
    """Sections with hardly any tissue beside that of their neighbours.

    Parameters
    ----------
    foreground : ndarray
        What stands out from each section's background, shape (Z, C, Y, X), >= 0.

    Returns
    -------
    tuple of int
        Increasing; all sections of a stack that shows nothing.
    """
    contrast = foreground.mean(axis=1)
    if contrast.max() <= 0:
        return tuple(range(len(contrast)))
    tissue = _tissue(contrast).mean(axis=(1, 2))
    blank = []
    for z, own in enumerate(tissue):
        before = [t for t in tissue[:z][::-1] if t > 0][:LOOKED_AT]
        after = [t for t in tissue[z + 1 :] if t > 0][:LOOKED_AT]
        if own <= BLANK_SHARE * (np.median(before + after) if before or after else 0.0):
            blank.append(z)
    return tuple(blank)


def _tissue(contrast: NDArray[np.float32]) -> NDArray[np.bool_]:
    """Where sections (Z, Y, X) stand out, by one threshold for the stack."""
    # a few hot pixels would stretch the histogram until all tissue falls into its first bin
    contrast = np.minimum(contrast, np.percentile(contrast, 99.9) or contrast.max())
    found: NDArray[np.bool_] = contrast > float(threshold_otsu(contrast.ravel()))  # type: ignore[no-untyped-call]
    return found


def inspect(
    sections: NDArray[np.float32],
    spacing: Spacing2D,
    *,
    max_angle: float = 30.0,
    keep_orientation: bool = False,
    refined: bool = True,
    progress: Callable[[str, int, int], None] = lambda *_: None,
) -> Inspection:
    """Register every section with the next and the next but one, and tell which are blank, turned, mirrored or torn.

    Parameters
    ----------
    sections : ndarray
        Shape (Z, C, Y, X), any grey levels; `WORKING_PIXELS` along the longer side are enough.
    spacing : tuple of float
        Pixel spacing (y, x) in mm.
    max_angle : float
        Largest rotation of a section beside how it should lie, degrees; below 45.
    keep_orientation : bool
        Take no section for turned or mirrored.
    refined : bool
        Refine the transforms, which finding faults does without.
    progress : callable, optional
        Called with the name of a stage, how much of it is done, and how much there is.

    Returns
    -------
    Inspection

    Examples
    --------
    >>> y, x = np.mgrid[:40, :50]
    >>> wedge = ((x > 8) & (x < 40) & (y > 10) & (y - 10 < 0.6 * x)) * (1.0 + 0.1 * np.sin(x / 3))
    >>> stack = np.stack([np.roll(wedge, z, axis=1) for z in range(5)])[:, None].astype(np.float32)
    >>> stack[2] = stack[2, :, ::-1, ::-1]
    >>> inspect(stack, (0.1, 0.1)).faults()
    {2: 'turned by 180 degrees'}
    """
    foreground = standing_out(sections)
    blank = find_blank(foreground)
    usable, seen = in_unit_range(torch.from_numpy(foreground))
    blank = tuple(sorted({*blank, *np.flatnonzero(~seen.numpy()).tolist()}))
    sound = np.setdiff1d(np.arange(len(sections)), blank)
    n = len(sound)
    listed = [(i, i + step) for step in (1, 2) for i in range(n - step)]
    images = usable[sound.tolist()]
    fits = fit_pairs(images, listed, spacing, 2 * max_angle, partial(progress, "checking sections"))
    orientations = np.zeros(n, np.int64)
    if not keep_orientation:
        orientations = find_orientations(fits.pairs, fits.correlation, n).sure
    between = orientations[fits.pairs[:, 0]] ^ orientations[fits.pairs[:, 1]]
    chosen = np.arange(len(listed)), between
    matrices, correlation = fits.matrices[chosen], fits.correlation[chosen]
    if refined:
        report = partial(progress, "refinement")
        matrices, correlation = refine_pairs(images, fits.pairs, between, matrices, spacing, report)
    of_all = np.full(len(sections), AS_IS)
    of_all[sound] = orientations
    fit = np.full(len(sections), np.nan)
    nearest = fits.pairs[fits.pairs[:, 1] - fits.pairs[:, 0] == 1]
    if n > 1:
        sums = np.bincount(nearest.ravel(), np.repeat(correlation[: n - 1], 2), n)
        fit[sound] = sums / np.bincount(nearest.ravel(), minlength=n)
    torn = tuple(sound[find_torn(correlation[: max(n - 1, 0)], correlation[max(n - 1, 0) :])].tolist())
    pairs = sound[fits.pairs] if n else fits.pairs
    return Inspection(blank, torn, of_all, fit, pairs, matrices, correlation)


def find_faults(
    sections: NDArray[np.float32], spacing: Spacing2D, progress: Callable[[str, int, int], None] = lambda *_: None
) -> Inspection:
    """`inspect` for sections of any size that lie about as they should, without refinement: only to find faults."""
    shape, step = working_grid((sections.shape[2], sections.shape[3]), spacing)
    level = border_level(sections)
    small = np.stack(
        [small_section(np.moveaxis(s, 0, -1), spacing, shape, step, b) for s, b in zip(sections, level, strict=True)]
    )
    return inspect(small, step, max_angle=PLACED_ANGLE, refined=False, progress=progress)


def find_torn(to_next: NDArray[np.float64], to_next_but_one: NDArray[np.float64]) -> list[int]:
    """Sections that fit both neighbours worse than these fit one another, and worse than is usual in the stack.

    The first and last section have one neighbour: they are compared with how that fits the next section but one.

    Parameters
    ----------
    to_next : ndarray
        Correlation of each section with the next, shape (N - 1,).
    to_next_but_one : ndarray
        The same over two sections, shape (N - 2,).

    Returns
    -------
    list of int
        Increasing; the first and the last section where there are six or more, so that the usual can be told.

    Examples
    --------
    >>> find_torn(np.array([0.99, 0.8, 0.75, 0.99]), np.array([0.8, 0.98, 0.7]))
    [2]
    >>> find_torn(np.array([0.6, 0.99, 0.99, 0.99, 0.98]), np.array([0.6, 0.97, 0.97, 0.96]))
    [0]
    """
    if not len(to_next_but_one):
        return []
    near, far = misfit(to_next), misfit(to_next_but_one)
    torn = (1 + np.flatnonzero(_unusual(np.minimum(near[:-1], near[1:]) - far, TORN))).tolist()
    if len(far) > 1:
        first = _unusual(near[:-2] - far[1:], TORN_AT_END)[0]  # beside the next, and that beside the next but one
        last = _unusual(near[2:] - far[:-1], TORN_AT_END)[-1]
        torn = [*[0] * bool(first), *torn, *[len(near)] * bool(last)]
    return torn


def _unusual(worse: NDArray[np.float64], least: float) -> NDArray[np.bool_]:
    """Which are above `least` and far above what is usual."""
    middle = float(np.median(worse))
    usual = middle + UNUSUAL * 1.4826 * float(np.median(np.abs(worse - middle)))
    found: NDArray[np.bool_] = worse > max(least, usual)
    return found


def standing_out(sections: NDArray[np.float32]) -> NDArray[np.float32]:
    """Distance of each pixel from the median of its section's border, shape (Z, C, Y, X)."""
    return np.abs(sections - border_level(sections)[:, :, None, None]).astype(np.float32)


def border_level(sections: NDArray[np.float32]) -> NDArray[np.float32]:
    """Median of each section's outermost pixels, (Z, C)."""
    border = [sections[:, :, 0], sections[:, :, -1], sections[..., 0], sections[..., -1]]
    return np.median(np.concatenate(border, axis=2), axis=2).astype(np.float32)


def align(sections: NDArray[np.float32], spacing: Spacing2D, inspection: Inspection) -> NDArray[np.float64]:
    """Rigid transforms from the aligned stack to each section.

    Parameters
    ----------
    sections, spacing
        As given to `inspect`.
    inspection : Inspection
        What it returned.

    Returns
    -------
    ndarray
        Shape (Z, 2, 3), mm: the point `p` (y, x; mm from the middle of the aligned section) is found at
        ``matrix[:, :2] @ p + matrix[:, 2]`` mm from the middle of the section as given. A blank section stays as it is.
    """
    usable, _ = in_unit_range(torch.from_numpy(standing_out(sections)))
    centres = _centres(usable, spacing)
    uncertain = _uncertainty(usable, centres, spacing, inspection)
    poses = solve_poses(inspection.pairs, inspection.matrices, inspection.orientations, centres, uncertain)
    return to_matrices(poses, inspection.orientations, centres)


def reach(
    sections: NDArray[np.float32], spacing: Spacing2D, matrices: NDArray[np.float64], blank: tuple[int, ...]
) -> tuple[float, float]:
    """How far the tissue of the aligned sections reaches along y and x from the middle of the aligned stack, mm.

    Parameters
    ----------
    sections, spacing
        As given to `inspect`.
    matrices : ndarray
        As `align` returns them.
    blank : tuple of int
        Sections that do not count.
    """
    contrast = standing_out(sections).mean(axis=1)
    if contrast.max() <= 0:
        return 0.0, 0.0
    furthest = np.zeros(2)
    for z, mask in enumerate(_tissue(contrast)):
        mask = binary_opening(mask)  # single pixels are dirt
        if z in blank or not mask.any():
            continue
        half = (np.array(mask.shape) - 1) / 2
        # to the outer edges of the pixels
        points = (np.argwhere(mask) - half) * spacing
        back = (points - matrices[z, :, 2]) @ matrices[z, :, :2]
        furthest = np.maximum(furthest, np.abs(back).max(axis=0) + np.array(spacing) / 2)
    return float(furthest[0]), float(furthest[1])


def _centres(images: Tensor, spacing: Spacing2D) -> NDArray[np.float64]:
    """Centre of mass of what stands out, mm from the middle of the section, (Z, 2); 0 where nothing does."""
    weight = images.mean(dim=1).double().numpy()
    weight = np.where(weight > 0.1, weight, 0.0)
    mass = np.maximum(weight.sum(axis=(1, 2)), 1e-9)
    y, x = ((np.arange(n) - (n - 1) / 2) * s for n, s in zip(weight.shape[1:], spacing, strict=True))
    return np.stack([(weight.sum(axis=2) @ y) / mass, (weight.sum(axis=1) @ x) / mass], axis=1)


def _uncertainty(
    images: Tensor, centres: NDArray[np.float64], spacing: Spacing2D, inspection: Inspection
) -> NDArray[np.float64]:
    """Of rotation (radians) and shift (mm) of each pair, up to a common factor, (K, 2).

    As of least squares: what the pair leaves unexplained over how much the image changes when it is moved. A round
    section says little about its rotation.
    """
    grey = images.mean(dim=1).double().numpy()
    along_y, along_x = np.gradient(grey, *spacing, axis=(1, 2))
    y, x = (
        (np.arange(n) - (n - 1) / 2)[None] * s - c[:, None]
        for n, s, c in zip(grey.shape[1:], spacing, centres.T, strict=True)
    )
    by_turning = ((along_x * y[:, :, None] - along_y * x[:, None, :]) ** 2).sum(axis=(1, 2))
    by_shifting = ((along_y**2 + along_x**2) / 2).sum(axis=(1, 2))
    variance = grey.var(axis=(1, 2))
    fixed = inspection.pairs[:, 0]
    left = np.exp(misfit(inspection.correlation)) * variance[fixed]
    return np.sqrt(left[:, None] / np.maximum(np.stack([by_turning, by_shifting], axis=1)[fixed], 1e-12))
