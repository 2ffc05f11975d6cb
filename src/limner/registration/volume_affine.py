"""Affine alignment of whole volumes to a template, in mm, by SimpleITK: mutual information from coarse to fine.

`make_template` crops a template to its brain, on a grid that networks take; `align` finds where each of its points lies
in a scan, `align_labels` in a label map of which there is no image; `resample` carries pixels and labels one way or the
other. A scan may be of any contrast, its axes may run in any order and direction, and a part of the brain may lie
outside its field of view. An `Alignment` says how well it fits, and in `failed` why it is not to be used.

A label map is aligned through an image painted from it: each label gets the mean intensity that the template has where
the label lies so far, so no table of usual intensities is needed, and any species and numbering will do.

References
----------
Mattes et al. 2003, "PET-CT image registration in the chest using free-form deformations",
https://doi.org/10.1109/TMI.2003.809072
"""

# mypy: disable-error-code="no-untyped-call"
# SimpleITK has no type hints.

from __future__ import annotations

import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray
from scipy import ndimage

from limner.registration.template import (
    Template,
    brain_or_found,
    first_and_last,
    mean_intensities,
    paint,
    scaled,
)
from limner.registration.volume_transform import (
    AffineTransform,
    check_volume,
    from_sitk,
    resampled,
    smoothed,
    to_image,
    to_sitk,
    transform_of,
    triple,
)
from limner.space import Space
from limner.volume import LabelMap, Volume

Mask = NDArray[np.bool_]

BINS = 32
FACE = 0.2  # a face of a scan is cut where it shows this share of the largest parallel section of the brain
LEAST_SEEN = 0.3  # share of the template's brain that a scan shows
LEAST_OVERLAP = 0.8  # Dice of the brains; aligned scans have .93 and more
LEAST_INFORMATION = 0.01  # of the template's entropy; human T1 .11, with much noise .07, flat T2 of mice .02, noise 0
BETTER = 1.5  # another orientation than the header's is taken where it fits so much better; 1.2 is chance
WORSE = 0.9  # a level that leaves less than this share of the fit it began with is undone
LEVELS = (4, 4, 2, 2, 1)  # shrink factors of the template's grid; each begins with long steps anew
LONGEST_STEP, SHORTEST_STEP = 2.0, 0.01  # in voxels of the template's grid
SAMPLED = 50_000  # voxels at the finest level
SEED = 1


@dataclass(frozen=True)
class Alignment:
    """A transform and how well it fits.

    Parameters
    ----------
    transform : AffineTransform
        From the template to the scan.
    overlap : float
        Dice of the two brains within the scan's field of view, 0 to 1.
    information : float
        Mutual information as a share of the template's entropy, 0 to 1.
    turned : bool
        The scan's header gives another orientation than what was found; left and right hang on it, so tell the user.
    failed : str
        Why the alignment is not to be used; empty where it is fine.
    """

    transform: AffineTransform
    overlap: float
    information: float
    turned: bool = False
    failed: str = ""

    def write(self, path: str | Path) -> None:
        """Write as JSON; an earlier file of this name is replaced once the new one is complete."""
        path = Path(path)
        partial = path.with_name(f".partial-{path.name}")
        about = "template to scan, physical points in mm, LPS, order z, y, x"
        partial.write_text(json.dumps({"points": about, **asdict(self)}, indent=1) + "\n", encoding="utf-8")
        partial.replace(path)


def read_alignment(path: str | Path) -> Alignment:
    """Read what `Alignment.write` wrote.

    Raises
    ------
    ValueError
        If the file is missing or holds something else.
    """
    try:
        content = json.loads(Path(path).read_text(encoding="utf-8"))
        transform = transform_of(np.array(content["transform"]["linear"]), np.array(content["transform"]["shift"]))
        others = {name: content[name] for name in ("overlap", "information", "turned", "failed")}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"read_alignment(): {path} holds no alignment ({error}); align the scan again") from None
    return Alignment(transform, **others)


def align(scan: Volume, template: Template, brain: Mask | None = None) -> Alignment:
    """Find the affine transform from a template to a scan.

    Parameters
    ----------
    scan : Volume
        Grey, of any contrast and grid; of a head with its skull give `brain` too.
    template : Template
        As of `make_template`.
    brain : ndarray of bool, optional
        Shape of `scan`, True inside the brain; else as of `find_brain`.

    Returns
    -------
    Alignment
        Check `failed` before use. Runs of one scan give the same numbers.

    Raises
    ------
    ValueError
        If the scan shows nothing, or is no grey image with evenly spaced sections.
    """
    check_volume(scan, "align")
    inside = brain_or_found(scan, brain, "align")
    moving = _field_of_view(scaled(scan.pixels, inside), inside, scan.space, template)
    start, turned = _best_start(template, moving)
    return _judged(template, moving, _register(template, moving, start), turned)


def align_labels(label_map: LabelMap, template: Template, intensities: Mapping[int, float] | None = None) -> Alignment:
    """Find the affine transform from a template to a label map, through an image painted from the labels.

    Parameters
    ----------
    label_map : LabelMap
        Labels of a brain, 0 outside it; leave out others first (skull, skin), by merging them into the background.
    template : Template
        As of `make_template`.
    intensities : mapping of int to float, optional
        Usual intensity of each label in an image like the template; else they are measured on it, anew after each
        level, from one intensity for all labels.

    Returns
    -------
    Alignment
        As of `align`.

    Raises
    ------
    ValueError
        If all is background, the sections are not evenly spaced, or a label has no intensity.
    """
    check_volume(label_map, "align_labels")
    inside = brain_or_found(label_map, label_map.labels > 0, "align_labels")
    painted = paint(label_map, intensities or dict.fromkeys(label_map.present, 1.0))
    moving = _field_of_view(scaled(painted, inside), inside, label_map.space, template)
    start, turned = _best_start(template, moving, by_outline=intensities is None)
    for levels in () if intensities else ((4, 4), (2, 2), (1,)):
        start = _register(template, moving, start, levels, by_outline=levels[0] == LEVELS[0])
        painted = paint(label_map, mean_intensities(label_map, template, start))
        moving = _field_of_view(scaled(painted, inside), inside, label_map.space, template)
    found = _register(template, moving, start, LEVELS if intensities else (2, 1))
    return _judged(template, moving, found, turned)


def _field_of_view(pixels: NDArray[np.float32], inside: Mask, space: Space, template: Template) -> sitk.Image:
    """The scan cropped to its brain, then padded with background where the brain ends and is not cut.

    What lies outside the image does not count in the metric: it is unknown where the brain was cut, and background
    where it was not.
    """
    bounds = [first_and_last(inside, axis) for axis in range(3)]
    cut = tuple(slice(a, b + 1) for a, b in bounds)
    image = to_image(pixels[cut], replace(space, origin=triple(space.to_physical([a for a, _ in bounds]))))
    pads = [_padding(inside[cut], axis, template.space.spacing[0] * 8 / space.spacing[axis]) for axis in range(3)][::-1]
    padded = sitk.ConstantPad(image, [a for a, _ in pads], [b for _, b in pads], 0.0)
    factors = [max(1, int(template.space.spacing[0] / s + 1e-3)) for s in padded.GetSpacing()]
    return sitk.BinShrink(padded, factors)


def _padding(inside: Mask, axis: int, wide: float) -> tuple[int, int]:
    areas = inside.sum(axis=tuple(i for i in range(3) if i != axis))
    first, last = (0 if areas[i] > FACE * areas.max() else round(wide) for i in (0, -1))
    return first, last


# ------------------------------------------------------------------------------------------------------ the search


def _best_start(template: Template, moving: sitk.Image, by_outline: bool = False) -> tuple[AffineTransform, bool]:
    """Centre of mass on centre of mass, as the header says or in one of the other 23 orientations.

    A header that mirrors the scan cannot be told from one that does not: mirrored orientations are not tried.
    """
    coarse = _coarse(template, 4)
    fixed_centre, moving_centre = _centre(template.image), _centre(moving)
    starts = []
    for turn in _turns():
        starts.append(transform_of(turn, moving_centre - turn @ fixed_centre))
    fits = [_fit(coarse, moving, start, by_outline) for start in starts]
    others = [starts[i] for i in np.argsort(fits)[::-1][:2] if fits[i] > BETTER * fits[0]]
    if not others:
        return starts[0], False
    found = [_register(template, moving, start, (4, 4), by_outline) for start in (starts[0], *others)]
    fits = [_fit(coarse, moving, one, by_outline) for one in found]
    best = int(np.argmax(fits))
    return (found[best], True) if fits[best] > BETTER * fits[0] else (found[0], False)


def _turns() -> list[NDArray[np.float64]]:
    """The 24 rotations by right angles, that by none first."""
    signed = [
        np.eye(3)[list(order)] * signs
        for order in itertools.permutations(range(3))
        for signs in itertools.product((1.0, -1.0), repeat=3)
    ]
    return [turn for turn in signed if np.linalg.det(turn) > 0]


def _centre(image: sitk.Image) -> NDArray[np.float64]:
    """Centre of mass of what is not background, mm (z, y, x)."""
    index = np.argwhere(sitk.GetArrayViewFromImage(image) > 0).mean(axis=0)
    return np.array(image.TransformContinuousIndexToPhysicalPoint(index[::-1].tolist())[::-1])


def _register(
    template: Template,
    moving: sitk.Image,
    start: AffineTransform,
    levels: Sequence[int] = LEVELS,
    by_outline: bool = False,
) -> AffineTransform:
    """Descend on Mattes' mutual information, one level after the other."""
    brain = to_image(template.brain.astype(np.uint8), template.space)
    mask, centre = sitk.BinaryDilate(brain, [3, 3, 3]), _centre(template.image)
    for shrink in levels:
        method = _descent(mask, shrink, template.space.spacing[0])
        transform = to_sitk(start, centre)
        method.SetInitialTransform(transform, inPlace=True)
        try:
            with _one_thread():
                method.Execute(template.image, moving)
        except RuntimeError:  # the images have come apart; the verdict will say so
            return start
        found = from_sitk(transform)
        if _sound(template, moving, start, found, by_outline):
            start = found
    return start


def _sound(
    template: Template, moving: sitk.Image, before: AffineTransform, after: AffineTransform, by_outline: bool
) -> bool:
    """Whether a level kept left from right and did not lose what it began with, as a first long step can."""
    if np.linalg.det(np.asarray(after.linear)) <= 0:
        return False
    return _fit(template, moving, after, by_outline) >= WORSE * _fit(template, moving, before, by_outline)


def _descent(mask: sitk.Image, shrink: int, voxel: float) -> sitk.ImageRegistrationMethod:
    """Steps of regular length, shortened at each turn; gradient descent that chooses its length ended too early."""
    method = sitk.ImageRegistrationMethod()
    method.SetMetricAsMattesMutualInformation(BINS)
    method.SetMetricFixedMask(mask)
    n_voxels = np.count_nonzero(sitk.GetArrayViewFromImage(mask))
    if shrink == 1 and n_voxels > SAMPLED:
        method.SetMetricSamplingStrategy(method.REGULAR)
        method.SetMetricSamplingPercentage(SAMPLED / n_voxels, SEED)
    method.SetInterpolator(sitk.sitkLinear)
    method.SetShrinkFactorsPerLevel([shrink])
    method.SetSmoothingSigmasPerLevel([(shrink - 1) * voxel / 2])
    method.SmoothingSigmasAreSpecifiedInPhysicalUnitsOn()
    method.SetOptimizerAsRegularStepGradientDescent(
        LONGEST_STEP * voxel, SHORTEST_STEP * voxel, 100, relaxationFactor=0.7, gradientMagnitudeTolerance=1e-8
    )
    method.SetOptimizerScalesFromPhysicalShift()
    return method


@contextmanager
def _one_thread() -> Iterator[None]:
    """SimpleITK's sums depend on the number of threads and on which is first."""
    before = sitk.ProcessObject.GetGlobalDefaultNumberOfThreads()
    sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(1)
    try:
        yield
    finally:
        sitk.ProcessObject.SetGlobalDefaultNumberOfThreads(before)


# ----------------------------------------------------------------------------------------------------- the verdict


def _judged(template: Template, moving: sitk.Image, transform: AffineTransform, turned: bool) -> Alignment:
    overlap, information, seen = _agreement(template, moving, transform)
    failed = ""
    if seen < LEAST_SEEN:
        failed = f"the scan shows {seen:.0%} of the template's brain (at least {LEAST_SEEN:.0%} is wanted)"
    elif overlap < LEAST_OVERLAP:
        failed = f"the brains overlap by {overlap:.2f} only (Dice; at least {LEAST_OVERLAP:g} is wanted)"
    elif information < LEAST_INFORMATION:
        failed = (
            f"the images share {information:.3f} of their information only (at least {LEAST_INFORMATION:g} is wanted)"
        )
    return Alignment(transform, overlap, information, turned, failed)


def _coarse(template: Template, step: int) -> Template:
    z, y, x = (n // step for n in template.space.shape)
    spacing = template.space.spacing[0] * step
    origin = template.space.to_physical([(step - 1) / 2] * 3)
    space = replace(template.space, shape=(z, y, x), spacing=(spacing,) * 3, origin=triple(origin))
    blocks = template.pixels.reshape(z, step, y, step, x, step)
    return Template(blocks.mean(axis=(1, 3, 5)) * ((blocks > 0).mean(axis=(1, 3, 5)) >= 0.5), space)


def _fit(template: Template, moving: sitk.Image, transform: AffineTransform, by_outline: bool) -> float:
    """To compare starts by; an image of one intensity has nothing but its outline."""
    overlap, information, seen = _agreement(template, moving, transform)
    if seen < LEAST_SEEN:
        return 0.0
    return overlap if by_outline else overlap * information


def _agreement(template: Template, moving: sitk.Image, transform: AffineTransform) -> tuple[float, float, float]:
    """Dice of the brains within the field of view; mutual information by the template's entropy inside both brains;
    and the share of the template's brain that lies in the field of view.
    """
    smooth = smoothed(moving, template.space.spacing[0])
    moved = sitk.GetArrayFromImage(resampled(smooth, template.space, transform, sitk.sitkLinear, outside=-1.0))
    fixed, seen = template.brain, moved >= 0
    scanned = moved >= 0.05
    both = fixed & scanned
    overlap = 2 * int(both.sum()) / max(int((fixed & seen).sum() + scanned.sum()), 1)
    inner = ndimage.binary_erosion(both)  # at the border both are dark, whatever they are
    share = int((fixed & seen).sum()) / int(fixed.sum())
    return overlap, _shared_information(template.pixels[inner], moved[inner]), share


def _shared_information(fixed: NDArray[np.float32], moved: NDArray[np.float32]) -> float:
    if not fixed.size:
        return 0.0
    joint = np.histogram2d(fixed, moved, BINS // 2, ((0, 1), (0, 1)))[0] / fixed.size
    of_fixed, of_moved = joint.sum(axis=1), joint.sum(axis=0)
    entropy = _entropy(of_fixed)
    return (entropy + _entropy(of_moved) - _entropy(joint)) / entropy if entropy > 0 else 0.0


def _entropy(shares: NDArray[np.float64]) -> float:
    some = shares[shares > 0]
    return float(-(some * np.log(some)).sum())
