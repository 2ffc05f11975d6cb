"""FreeSurfer's MGZ and MGH, read and written by nibabel, which is imported when such a file comes up.

nibabel orders axes i, j, k and points right, anterior, superior (RAS); Limner orders them z, y, x and points left,
posterior, superior (LPS).
"""

# mypy: disable-error-code="no-untyped-call"
# nibabel has few type hints.

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io.content import Content, Triple, reading, real_pixels, unreadable
from limner.space import Space
from limner.volume import Source

FREESURFER_ENDINGS = (".mgz", ".mgh")
LPS_OF_RAS = np.diag([-1.0, -1.0, 1.0])


def load_mgh(path: Path, extension: str) -> Content:
    """Read an MGZ or MGH file.

    Parameters
    ----------
    path : Path
        An existing file.
    extension : str
        One of `FREESURFER_ENDINGS`.

    Returns
    -------
    Content
        Pixels (Z, Y, X), z the file's third axis.

    Raises
    ------
    ValueError
        If the file is damaged, holds several frames, or its axes are not at right angles.
    """
    from nibabel.freesurfer.mghformat import MGHImage

    with reading(path), gzip.open(path) if extension == ".mgz" else path.open("rb") as file:
        image = MGHImage.from_bytes(file.read())  # all of it, so that gzip compares its checksum
        affine, lengths = np.asarray(image.affine, float), tuple(int(n) for n in image.shape)
    if any(n > 1 for n in lengths[3:]):
        raise ValueError(
            f"read(): {path} has {len(lengths)} axes of lengths {lengths[::-1]}; give one volume (z, y, x), "
            "not a time series"
        )
    with reading(path):
        pixels = np.asanyarray(image.dataobj).reshape(lengths[:3]).transpose(2, 1, 0)
    spacing, origin, direction = _geometry(affine, path)
    source = Source("volume", path, extension)
    return Content(np.ascontiguousarray(real_pixels(pixels, path)), spacing, source, origin, direction)


def save_mgh(path: Path, pixels: NDArray[Any], space: Space) -> None:
    """Write pixels (Z, Y, X) with their geometry; what the format has no type for takes the next larger one.

    Raises
    ------
    ValueError
        If a label is above 2147483647, the largest that the format holds.
    """
    from nibabel.freesurfer.mghformat import MGHImage

    affine = np.eye(4)
    columns = np.asarray(space.direction)[::-1, ::-1] * np.asarray(space.spacing)[::-1]
    affine[:3, :3] = LPS_OF_RAS @ columns
    affine[:3, 3] = LPS_OF_RAS @ np.asarray(space.origin)[::-1]
    MGHImage(_in_a_type_of_mgh(pixels).transpose(2, 1, 0), affine).to_filename(path)


def _in_a_type_of_mgh(pixels: NDArray[Any]) -> NDArray[Any]:
    """The format knows uint8, int16, int32 and float32."""
    if pixels.dtype in (np.uint8, np.float32):
        return pixels
    largest = int(pixels.max()) if pixels.size else 0
    for dtype in (np.int16, np.int32):
        if largest <= np.iinfo(dtype).max:
            return pixels.astype(dtype)
    raise ValueError(f"write_result(): the largest label is {largest}; MGZ holds up to 2147483647, write NIfTI")


def _geometry(affine: NDArray[np.float64], path: Path) -> tuple[Triple, Triple, tuple[Triple, ...]]:
    columns = LPS_OF_RAS @ affine[:3, :3]
    spacing = np.linalg.norm(columns, axis=0)
    if not (spacing > 0).all() or not np.isfinite(affine).all():
        raise unreadable(path, f"its spacing is {tuple(spacing.tolist())} mm")
    direction = columns / spacing
    if not np.allclose(direction.T @ direction, np.eye(3), atol=1e-3):
        raise ValueError(
            f"read(): the axes of {path} are not at right angles (its affine is sheared); resample it to a grid "
            "without shear"
        )
    rows = tuple(_triple(row) for row in direction[::-1, ::-1])
    # the header holds float32: 0.7, not 0.699999988079071
    return _triple(np.round(spacing[::-1], 6)), _triple((LPS_OF_RAS @ affine[:3, 3])[::-1]), rows


def _triple(values: NDArray[np.float64]) -> Triple:
    a, b, c = (float(v) for v in values)
    return a, b, c
