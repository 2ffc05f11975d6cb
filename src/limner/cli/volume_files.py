"""The volumes that a command is given: one file, or a folder in which every file is a scan, or a label map."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io import names_read, read, read_label_volume
from limner.io.freesurfer import FREESURFER_ENDINGS
from limner.io.sections import natural_key
from limner.io.volumes import VOLUME_ENDINGS
from limner.registration.template import find_brain
from limner.registration.volume_transform import resample
from limner.run_record import content_key, hash_inputs
from limner.space import Space
from limner.volume import LabelMap, Volume

ENDINGS = VOLUME_ENDINGS + FREESURFER_ENDINGS
MOST_ALIKE = 0.6  # of a scan, as of `equal_neighbours`


def list_volumes(path: Path, argument: str) -> dict[str, Path]:
    """Volumes by name, which is that of the file without its ending, in natural order.

    Parameters
    ----------
    path : Path
        A file, or a folder; hidden files, folders and files of other formats in it are passed over.
    argument : str
        What named it, for messages.

    Raises
    ------
    ValueError
        If the path is missing, there is no volume, or two would have one name; upper and lower case count as the same.
    """
    if not path.exists():
        raise ValueError(f"{argument}: {path} does not exist; name a volume or a folder of volumes")
    files = [path] if path.is_file() else [p for p in path.iterdir() if p.is_file() and not p.name.startswith(".")]
    found = sorted((p for p in files if _ending(p)), key=lambda p: natural_key(p.name))
    if not found:
        what = "is no volume" if path.is_file() else "holds no volume"
        raise ValueError(f"{argument}: {path} {what}; give files ending in {', '.join(ENDINGS)}")
    taken: dict[str, Path] = {}
    for file in found:
        other = taken.setdefault(_name(file).lower(), file)
        if other != file:
            raise ValueError(f"{argument}: {other} and {file.name} have the same name; rename one of them")
    return {_name(file): file for file in found}


def companions(path: Path, scans: Mapping[str, Path], option: str) -> dict[str, Path]:
    """Volumes that belong to scans, by the names of these: those of a folder under the same names, or a file for one.

    Raises
    ------
    ValueError
        If there is none for any scan.
    """
    found = list_volumes(path, option)
    if path.is_file() and len(scans) == 1:
        return dict.fromkeys(scans, path)
    mine = {name: found[name] for name in scans if name in found}
    if not mine:
        raise ValueError(f"{option}: {path} holds no volume named as a scan ({next(iter(scans))}, ...); rename them")
    return mine


def read_scan(path: Path) -> Volume:
    """Read a grey volume.

    Raises
    ------
    ValueError
        If it cannot be read, has several channels or frames, or shows one value alone.
    """
    volume = read(path)
    if volume.pixels.ndim == 4:
        raise ValueError(f"read_scan(): {path} is in colour; give a grey scan")
    if volume.pixels.min() == volume.pixels.max():
        raise ValueError(f"read_scan(): {path} shows nothing, every voxel is {volume.pixels.flat[0]:g}; give a scan")
    return volume


def brain_of(volume: Volume, mask: Path | None) -> NDArray[np.bool_]:
    """Where the brain is, shape of the scan: as a mask says, which may have a grid of its own, or as of `find_brain`.

    Raises
    ------
    ValueError
        If there is none, or it shows one value alone.
    """
    brain = find_brain(volume.pixels) if mask is None else labels_on(volume.space, read_label_volume(mask)) > 0
    of = "" if volume.source is None else volume.source.path
    if not brain.any():
        raise ValueError(f"brain_of(): there is no brain in {of}; give a mask of it (--masks)")
    if volume.pixels[brain].min() == volume.pixels[brain].max():
        raise ValueError(f"brain_of(): the brain in {of} has one grey level; give a scan, not a mask or label map")
    if (alike := equal_neighbours(np.where(brain, volume.pixels, 0))) > MOST_ALIKE:
        raise ValueError(f"brain_of(): {of} is a label map: {alike:.0%} of neighbouring voxels are equal; give a scan")
    return brain


def equal_neighbours(pixels: NDArray[Any]) -> float:
    """Share of neighbours along x, neither of them 0, that are equal: of label maps .8 and more, of scans under .1.

    Examples
    --------
    >>> equal_neighbours(np.array([[[0, 1, 1, 1, 2, 0]]]))
    0.6666666666666666
    """
    both = (pixels[..., 1:] != 0) & (pixels[..., :-1] != 0)
    return float((pixels[..., 1:] == pixels[..., :-1])[both].mean()) if both.any() else 1.0


def labels_on(space: Space, label_map: LabelMap) -> NDArray[np.integer]:
    """Labels on a grid, from the nearest voxel where they have another."""
    return label_map.labels if label_map.space == space else resample(label_map, space).labels


def hash_volume(path: Path) -> str:
    """SHA-256 of a volume's file, or of those of a header and what it names."""
    hashes = list(hash_inputs(path, names_read(path)).values())
    return hashes[0] if len(hashes) == 1 else content_key(hashes)


def _ending(path: Path) -> str:
    """The longest that fits, so that ``.nii.gz`` is not taken for ``.gz``; empty for files of other formats."""
    return max((e for e in ENDINGS if path.name.lower().endswith(e)), key=len, default="")


def _name(path: Path) -> str:
    return path.name[: -len(_ending(path))]
