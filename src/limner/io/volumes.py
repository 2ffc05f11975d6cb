"""NIfTI, NRRD, MHA and MGZ: one file that states its own geometry, read and written by SimpleITK.

SimpleITK orders points and directions x, y, z; Limner orders them z, y, x. The frame is LPS in both.
"""

# mypy: disable-error-code="no-untyped-call"
# SimpleITK has no type hints.

from __future__ import annotations

import gzip
import math
import os
import re
import struct
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from numpy.typing import NDArray

from limner.io.content import Content, Triple, complete_spacing, real_pixels, unreadable, without_alpha
from limner.space import Space
from limner.volume import Source

VOLUME_ENDINGS = (".nii", ".nii.gz", ".nrrd", ".nhdr", ".mha", ".mhd")
MICRON_NAMES = {"um", "µm", "μm", "micron", "microns", "micrometer", "micrometre"}


def load_volume(path: Path, extension: str) -> Content:
    """Read a NIfTI, NRRD or MHA file.

    Parameters
    ----------
    path : Path
        An existing file.
    extension : str
        One of `VOLUME_ENDINGS`.

    Returns
    -------
    Content
        Pixels (Z, Y, X) or (Z, Y, X, 3); the spacing is None for a NRRD file that states none.

    Raises
    ------
    ValueError
        If the file is damaged, has more than three axes, or neither one channel nor RGB.
    """
    not_finite = _check_nifti(path) if extension in (".nii", ".nii.gz") else []
    image = _read(path)
    pixels = sitk.GetArrayFromImage(image)
    if image.GetNumberOfComponentsPerPixel() > 1:
        pixels = _rgb(pixels, path)
    channels = pixels.shape[image.GetDimension() :]
    pixels = real_pixels(pixels.reshape(*_three_axes(image.GetSize()), *channels), path)
    for start, marks in not_finite:
        voxels = (start + np.flatnonzero(np.unpackbits(marks))) % math.prod(pixels.shape[:3])
        pixels[np.unravel_index(voxels, pixels.shape[:3])] = np.nan
    spacing, origin, direction = _geometry(image)
    in_microns = False
    if extension in (".nrrd", ".nhdr"):
        has_spacing, in_microns = _nrrd_header(path)
        spacing = spacing if has_spacing else None
    if in_microns:
        spacing = None if spacing is None else _triple(np.divide(spacing, 1000))
        origin = _triple(np.divide(origin, 1000))
    return Content(pixels, spacing, Source("volume", path, extension, in_microns=in_microns), origin, direction)


def detached_names(path: Path) -> tuple[str, ...]:
    """Names of the files that hold the pixels of a MetaImage or NRRD header, relative to its folder.

    Parameters
    ----------
    path : Path
        A ``.mha``, ``.mhd``, ``.nrrd`` or ``.nhdr`` file. Its header names one file, a list of files, or a pattern
        (``s%03d.raw 1 10 1``), which here stands for every file that has its form.

    Returns
    -------
    tuple of str
        Empty where the file holds its pixels itself.
    """
    with path.open("rb") as file:
        text = file.read(1 << 20).decode("utf-8", "surrogateescape").replace("\r\n", "\n")
    header = text.split("\n\n")[0] if text.startswith("NRRD") else text
    named = re.search(r"^(?:ElementDataFile[ \t]*=|data ?file[ \t]*:(?!=))(.*)$", header, re.MULTILINE | re.IGNORECASE)
    words = named[1].split() if named else ["LOCAL"]
    if named is None or not words or words[0].upper() == "LOCAL":
        return ()
    if words[0].upper() == "LIST":
        return tuple(line.strip() for line in header[named.end() :].splitlines() if line.strip())
    if "%" in words[0] and not (path.parent / named[1].strip()).exists():
        pattern = Path(words[0])
        form = re.compile(r"\d+".join(re.escape(part) for part in re.split(r"%\d*d", pattern.name)))
        found = sorted(p.name for p in (path.parent / pattern).parent.iterdir())
        return tuple((pattern.parent / name).as_posix() for name in found if form.fullmatch(name))
    return (named[1].strip(),)


def save_volume(path: Path, pixels: NDArray[Any], space: Space, in_microns: bool = False, bare: bool = False) -> None:
    """Write pixels (Z, Y, X) or (Z, Y, X, 3) with their geometry, compressed where the format allows it.

    NRRD states it in microns if asked, and where `bare` no geometry at all.
    """
    image = sitk.GetImageFromArray(np.ascontiguousarray(pixels), isVector=pixels.ndim == 4)
    unit = 1e3 if in_microns else 1.0
    image.SetSpacing([unit * s for s in space.spacing[::-1]])
    image.SetOrigin([unit * o for o in space.origin[::-1]])
    image.SetDirection(np.asarray(space.direction)[::-1, ::-1].ravel().tolist())
    with _silent_stderr():
        sitk.WriteImage(image, str(path), useCompression=True)
    if in_microns or bare:  # SimpleITK can neither write the unit nor leave the spacing out
        header, pixel_bytes = path.read_bytes().split(b"\n\n", 1)
        lines = [line for line in header.split(b"\n") if not (bare and line.startswith(b"space"))]
        units = [] if bare else [b'space units: "um" "um" "um"']
        path.write_bytes(b"\n".join(lines + units) + b"\n\n" + pixel_bytes)


def _read(path: Path) -> sitk.Image:
    reader = sitk.ImageFileReader()
    reader.SetFileName(str(path))
    try:
        with _silent_stderr():
            reader.ReadImageInformation()
            _check_axes(path, reader)
            return reader.Execute()
    except RuntimeError as error:
        if "orthonormal" in str(error):
            raise ValueError(
                f"read(): the axes of {path} are not at right angles (its affine is sheared); resample it to a grid "
                "without shear"
            ) from None
        raise unreadable(path, error) from None


def _check_axes(path: Path, reader: sitk.ImageFileReader) -> None:
    size = reader.GetSize()
    if len(size) < 2 or any(n > 1 for n in size[3:]):
        raise ValueError(
            f"read(): {path} has {len(size)} axes of lengths {size[::-1]}; give one volume (z, y, x), not a time series"
        )


def _three_axes(size: tuple[int, ...]) -> tuple[int, int, int]:
    x, y, z = (*size, 1)[:3]
    return z, y, x


def _rgb(pixels: NDArray[Any], path: Path) -> NDArray[Any]:
    # Two components, or four of another type, are not known to be grey or colour with alpha.
    if pixels.shape[-1] == 3 or (pixels.shape[-1] == 4 and pixels.dtype in (np.uint8, np.uint16)):
        return without_alpha(pixels, path)
    raise ValueError(
        f"read(): {path} has {pixels.shape[-1]} components of type {pixels.dtype} a voxel; give grey (1) or RGB (3)"
    )


def _geometry(image: sitk.Image) -> tuple[Triple | None, Triple, tuple[Triple, ...]]:
    axes = min(image.GetDimension(), 3)
    matrix, origin = np.eye(3), np.zeros(3)
    matrix[:axes, :axes] = np.reshape(image.GetDirection(), (image.GetDimension(),) * 2)[:axes, :axes]
    origin[:axes] = image.GetOrigin()[:axes]
    x, y, z = (*(_shortest(s) for s in image.GetSpacing()), None)[:3]
    direction = tuple(_triple(row) for row in matrix[::-1, ::-1])
    return complete_spacing((z, y, x), n_sections=1), _triple(origin[::-1]), direction


def _shortest(value: float) -> float:
    """0.05 for the 0.05000000074505806 of a NIfTI header, which stores float32; other values stay as they are."""
    single = np.float32(value)
    return float(str(single)) if float(single) == value else value


def _triple(values: NDArray[np.float64]) -> Triple:
    a, b, c = (float(v) for v in values)
    return a, b, c


def _nrrd_header(path: Path) -> tuple[bool, bool]:
    """Whether it states spacings, and in microns; SimpleITK fills missing ones with 1 and passes over the unit."""
    with path.open("rb") as file:
        header = file.read(65536).split(b"\n\n")[0].decode("latin-1")
    if not re.search(r"^(spacings|space directions)\s*:", header, re.MULTILINE):
        return False, False
    units = re.search(r"^(?:space units|units)\s*:(.*)$", header, re.MULTILINE)
    names = set(re.findall(r'"([^"]+)"', units[1])) if units else set()
    return True, bool(names & MICRON_NAMES)


def _check_nifti(path: Path) -> list[tuple[int, NDArray[np.uint8]]]:
    """Check what SimpleITK passes over in silence, with one block of the file in memory at a time.

    It fills the missing end of a truncated file with zeros, so the bytes are counted; and it reads NaN and infinity as
    0, so for each block that holds any its first pixel and one bit a pixel, 1 where not finite, are returned.
    """
    with path.open("rb") as file:
        compressed = file.read(2) == b"\x1f\x8b"
    found, not_finite = 0, []
    try:
        with gzip.open(path) if compressed else path.open("rb") as file:
            offset, expected, dtype = _nifti_pixels(path, file.read(352))
            file.seek(offset)
            while block := file.read(1 << 22):  # on to the end of the file: there a gzip file has its checksum
                if dtype is not None:
                    n = max(min(len(block), expected - found), 0) // dtype.itemsize
                    finite = np.isfinite(np.frombuffer(block, dtype, n))
                    if not finite.all():
                        not_finite.append((found // dtype.itemsize, np.packbits(~finite)))
                found += len(block)
    except (OSError, EOFError, IndexError, OverflowError, struct.error, zlib.error) as error:
        raise unreadable(path, error) from None
    if found < expected:
        raise unreadable(path, f"{expected} bytes of pixels are announced, {found} are there")
    return not_finite


def _nifti_pixels(path: Path, header: bytes) -> tuple[int, int, np.dtype[Any] | None]:
    """Where the pixels begin, how many bytes they take, and their type if it can hold NaN, by a NIfTI-1 header."""
    order = "<" if header[0] else ">"
    if struct.unpack_from(order + "i", header) == (540,):
        raise ValueError(f"read(): {path} is NIfTI-2, which SimpleITK cannot read; save it as NIfTI-1 or NRRD")
    n_axes, *lengths = struct.unpack_from(order + "8h", header, 40)
    code, bits = struct.unpack_from(order + "2h", header, 70)
    (offset,) = struct.unpack_from(order + "f", header, 108)
    n_bytes = math.prod(max(n, 1) for n in lengths[: max(n_axes, 0)]) * bits // 8
    floats = {16: "f4", 64: "f8"}
    return int(min(max(352, offset), 2**62)), n_bytes, np.dtype(order + floats[code]) if code in floats else None


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """MetaImage and niftilib print on the C library's stderr; what matters also comes as an exception."""
    kept = os.dup(2)
    with Path(os.devnull).open("w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)
