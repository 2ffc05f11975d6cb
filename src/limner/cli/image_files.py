"""The images that a command is given: one file, one OME-Zarr, or a folder of them; and hashes of what it is given."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

from limner.io import names_read
from limner.io.annotated_images import is_image
from limner.io.geojson_sections import holds_geojson
from limner.io.ome_zarr import is_ome_zarr
from limner.io.sections import natural_key
from limner.io.slide import SLIDE_ENDINGS
from limner.run_record import content_key, hash_file, hash_inputs


def list_images(path: Path) -> list[Path]:
    """Images in natural order: `path` itself, or of a folder the files and OME-Zarr folders that may be images.

    Hidden files, folders and files of other formats are passed over.

    Raises
    ------
    ValueError
        If the path is missing, or the folder holds no image.
    """
    if not path.exists():
        raise ValueError(f"IMAGES: {path} does not exist; name an image, a slide or a folder of them")
    if path.is_file() or is_ome_zarr(path):
        return [path]
    found = [p for p in path.iterdir() if not p.name.startswith(".") and is_image(p)]
    if not found:
        raise ValueError(f"IMAGES: {path} holds no image; give a folder of files ending in {', '.join(SLIDE_ENDINGS)}")
    return sorted(found, key=lambda p: natural_key(p.name))


def result_names(images: Sequence[Path]) -> dict[str, Path]:
    """Images by the name of their results: the file's name without endings, ``a`` of ``a.svs`` and of ``a.ome.tif``.

    Raises
    ------
    ValueError
        If two images would have results of one name; upper and lower case count as the same.

    Examples
    --------
    >>> list(result_names([Path("slides/a.ome.tif"), Path("slides/a.b.png")]))
    ['a', 'a.b']
    """
    by_name: dict[str, list[Path]] = defaultdict(list)
    for image in images:
        by_name[image.stem.removesuffix(".ome").lower()].append(image)
    for alike in by_name.values():
        if len(alike) > 1:
            name = alike[0].stem.removesuffix(".ome")
            raise ValueError(
                f"IMAGES: {alike[0]} and {alike[1].name} would both have results called {name}; rename one of them"
            )
    return {image.stem.removesuffix(".ome"): image for image in images}


def hash_image(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of an OME-Zarr."""
    if path.is_file():
        return hash_file(path)
    files = sorted(p for p in path.rglob("*") if p.is_file())
    return content_key([(p.relative_to(path).as_posix(), hash_file(p)) for p in files])


def hash_stack(path: Path) -> dict[str, str]:
    """SHA-256 of a stack, its labels or another file, by name: of what is read of it, and of an OME-Zarr as a whole."""
    if is_ome_zarr(path):
        return {path.name: hash_image(path)}
    return hash_inputs(path) if holds_geojson(path) else hash_inputs(path, names_read(path))
