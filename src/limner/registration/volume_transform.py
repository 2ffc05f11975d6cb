"""An affine transform of physical space, and volumes brought to other grids through it, by SimpleITK.

SimpleITK orders axes, points and matrices x, y, z; Limner orders them z, y, x. The frame is LPS in both.
"""

# mypy: disable-error-code="no-untyped-call"
# SimpleITK has no type hints.

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, overload

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from limner.space import Space
from limner.volume import LabelMap, Volume

Triple = tuple[float, float, float]


@dataclass(frozen=True)
class AffineTransform:
    """Where a point of the template lies in the scan: ``linear @ point + shift``.

    Parameters
    ----------
    linear : tuple of tuple of float
        3 x 3.
    shift : tuple of float
        mm. Points are physical (LPS, as of `Space`), in the order z, y, x.

    Examples
    --------
    >>> move = AffineTransform(shift=(0.0, 0.0, 5.0))
    >>> move.inverse()([[1.0, 2.0, 3.0]])
    array([[ 1.,  2., -2.]])
    """

    linear: tuple[Triple, Triple, Triple] = ((1.0, 0.0, 0.0), (0.0, 1.0, 0.0), (0.0, 0.0, 1.0))
    shift: Triple = (0.0, 0.0, 0.0)

    def __call__(self, points: Any) -> NDArray[np.float64]:
        """Points moved, shape (..., 3), mm (z, y, x)."""
        return np.asarray(points, float) @ np.asarray(self.linear).T + np.asarray(self.shift)

    def inverse(self) -> AffineTransform:
        """From the scan to the template."""
        linear = np.linalg.inv(np.asarray(self.linear))
        return transform_of(linear, -linear @ np.asarray(self.shift))


def transform_of(linear: NDArray[np.float64], shift: NDArray[np.float64]) -> AffineTransform:
    """A transform of arrays (3, 3) and (3,)."""
    a, b, c = (triple(row) for row in linear)
    return AffineTransform((a, b, c), triple(shift))


@overload
def resample(what: Volume, onto: Space, transform: AffineTransform | None = None) -> Volume: ...
@overload
def resample(what: LabelMap, onto: Space, transform: AffineTransform | None = None) -> LabelMap: ...
def resample(what: Volume | LabelMap, onto: Space, transform: AffineTransform | None = None) -> Volume | LabelMap:
    """Bring pixels or labels to another grid.

    Parameters
    ----------
    what : Volume or LabelMap
        Pixels are interpolated linearly, smoothed first where the other grid is coarser; labels come from the nearest
        voxel.
    onto : Space
        The grid wanted.
    transform : AffineTransform, optional
        From points of `onto` to points of ``what.space``: ``alignment.transform`` brings a scan to the template, its
        inverse a result to the scan's own grid. Else both lie in one frame.

    Returns
    -------
    Volume or LabelMap
        On the grid of `onto`, 0 where `what` has nothing; pixels are float32, labels keep their type.

    Raises
    ------
    ValueError
        If pixels are no grey image, or sections are unevenly spaced.

    Examples
    --------
    >>> labels = LabelMap(np.full((2, 2, 2), 7), Space((2, 2, 2), (1.0, 1.0, 1.0)))
    >>> resample(labels, Space((1, 1, 4), (1.0, 1.0, 1.0))).labels
    array([[[7, 7, 0, 0]]])
    """
    check_volume(what, "resample")
    if isinstance(what, LabelMap):
        image = to_image(what.labels.astype(np.int32, copy=False), what.space)
        found = resampled(image, onto, transform or AffineTransform(), sitk.sitkNearestNeighbor)
        labels = sitk.GetArrayFromImage(found).astype(what.labels.dtype, copy=False)
        return LabelMap(labels, onto, what.table)
    image = to_image(what.pixels.astype(np.float32, copy=False), what.space)
    image = smoothed(image, min(onto.spacing))
    found = resampled(image, onto, transform or AffineTransform(), sitk.sitkLinear)
    return Volume(sitk.GetArrayFromImage(found), onto)


def covered(space: Space, onto: Space, transform: AffineTransform | None = None) -> NDArray[np.bool_]:
    """Which voxels of `onto` lie within the grid `space`; arguments as of `resample`."""
    image = to_image(np.ones(space.shape, np.uint8), space)
    found = resampled(image, onto, transform or AffineTransform(), sitk.sitkNearestNeighbor)
    return sitk.GetArrayFromImage(found) > 0


def to_image(pixels: NDArray[Any], space: Space) -> sitk.Image:
    """Pixels (Z, Y, X) and their geometry for SimpleITK, which orders axes x, y, z."""
    image = sitk.GetImageFromArray(np.ascontiguousarray(pixels))
    image.SetSpacing(space.spacing[::-1])
    image.SetOrigin(space.origin[::-1])
    image.SetDirection(np.asarray(space.direction)[::-1, ::-1].ravel().tolist())
    return image


def resampled(
    image: sitk.Image, onto: Space, transform: AffineTransform, interpolator: int, outside: float = 0.0
) -> sitk.Image:
    """`image` on the grid `onto`, `outside` where it has nothing."""
    method = sitk.ResampleImageFilter()
    method.SetSize(onto.shape[::-1])
    method.SetOutputSpacing(onto.spacing[::-1])
    method.SetOutputOrigin(onto.origin[::-1])
    method.SetOutputDirection(np.asarray(onto.direction)[::-1, ::-1].ravel().tolist())
    method.SetTransform(to_sitk(transform))
    method.SetInterpolator(interpolator)
    method.SetDefaultPixelValue(outside)
    return method.Execute(image)


def smoothed(image: sitk.Image, spacing_mm: float) -> sitk.Image:
    """Against aliasing: along each axis a Gaussian that makes the voxels as wide as those of the coarser grid."""
    for axis, own in enumerate(image.GetSpacing()):
        if spacing_mm > own and image.GetSize()[axis] >= 4:
            sigma = float(np.sqrt(spacing_mm**2 - own**2)) / 2.355
            image = sitk.RecursiveGaussian(image, sigma, False, sitk.RecursiveGaussianImageFilter.ZeroOrder, axis)
    return image


def to_sitk(transform: AffineTransform, centre: NDArray[np.float64] | None = None) -> sitk.AffineTransform:
    """About `centre` (mm; z, y, x), so that rotations and shifts hardly depend on one another."""
    linear, shift = np.asarray(transform.linear), np.asarray(transform.shift)
    about = np.zeros(3) if centre is None else centre
    shift = shift + linear @ about - about
    return sitk.AffineTransform(linear[::-1, ::-1].ravel().tolist(), shift[::-1].tolist(), about[::-1].tolist())


def from_sitk(transform: sitk.AffineTransform) -> AffineTransform:
    """Inverse of `to_sitk`."""
    linear = np.reshape(transform.GetMatrix(), (3, 3))[::-1, ::-1]
    centre, shift = (np.array(v)[::-1] for v in (transform.GetCenter(), transform.GetTranslation()))
    return transform_of(linear, shift + centre - linear @ centre)


def check_volume(what: Volume | LabelMap, function: str) -> None:
    """Raise `ValueError` for colours and uneven sections."""
    if isinstance(what, Volume) and what.pixels.ndim == 4:
        raise ValueError(f"{function}(): the image is in colour; give a grey one")
    if what.space.positions is not None:
        raise ValueError(f"{function}(): the sections are unevenly spaced; resample them to even steps first")


def triple(values: Iterable[float]) -> Triple:
    """Three numbers as a tuple of float."""
    z, y, x = (float(v) for v in values)
    return z, y, x
