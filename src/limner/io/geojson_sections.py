"""Labels of a stack from QuPath GeoJSON: one file a section, under the images' names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.io.geojson import GEOJSON_ENDINGS, UNCLASSIFIED, is_geojson, rasterise, read_objects
from limner.io.label_tables import default_colour
from limner.io.outlines import Outline
from limner.io.sections import SECTION_ENDINGS, centre, natural_key
from limner.volume import Label, LabelMap, LabelTable, Volume


def holds_geojson(path: Path) -> bool:
    """Whether `path` is a GeoJSON file, or a folder with one and without section images."""
    if path.is_file():
        return is_geojson(path)
    if not path.is_dir():
        return False
    names = [p.name.lower() for p in path.iterdir() if not p.name.startswith(".")]
    return any(n.endswith((".geojson", ".geojson.gz")) for n in names) and not any(
        n.endswith(SECTION_ENDINGS) for n in names
    )


def labels_from_geojson(
    path: Path, like: Volume | LabelMap, table: LabelTable | None
) -> tuple[LabelMap, tuple[int, ...]]:
    """Class labels on the grid of `like`, with their table, and the indices of the sections that have a file.

    Raises
    ------
    ValueError
        If a file is damaged or named like no section, two are for one section, or a class is not in the table.
    """
    drawn, table = open_geojson(path, like, table)
    sections = {i: draw() for i, draw in drawn.items()}
    labels = np.zeros(like.space.shape, _type_for(table))
    for i, section in sections.items():
        labels[i] = centre(section, like.space.shape[1:], 0)
    source = None if like.source is None else replace(like.source, path=path)
    return LabelMap(labels, like.space, table, source), tuple(sorted(sections))


def open_geojson(
    path: Path, like: Volume | LabelMap, table: LabelTable | None
) -> tuple[dict[int, Callable[[], NDArray[np.integer[Any]]]], LabelTable]:
    """What draws the labels of each section that has a file, at its own size, and the table; errors as above."""
    files = _match(path, like)
    objects = {i: read_objects(file) for i, file in files.items()}
    if table is None:
        table = _table_of(objects)
    classes, dtype = {label.name: index for index, label in table.items()}, _type_for(table)

    def draw(i: int) -> NDArray[np.integer[Any]]:
        size = like.space.shape[1:] if like.source is None or not like.source.sizes else like.source.sizes[i]
        try:
            return rasterise(objects[i], size, classes).astype(dtype, copy=False)
        except ValueError as error:
            raise ValueError(f"read_labels(): {files[i]}: {error}") from None

    return {i: partial(draw, i) for i in files}, table


def _type_for(table: LabelTable) -> type[np.integer[Any]]:
    highest = max(table, default=0)
    return next(d for d in (np.uint8, np.uint16, np.int32) if highest <= np.iinfo(d).max)


def _match(path: Path, like: Volume | LabelMap) -> dict[int, Path]:
    """Section index of each file."""
    if path.is_file():
        if like.space.shape[0] != 1:
            raise ValueError(
                f"read_labels(): {path} is one GeoJSON, but the stack has {like.space.shape[0]} sections; give a "
                "folder with one a section"
            )
        return {0: path}
    if like.source is None or not like.source.names:
        raise ValueError(
            f"read_labels(): {path} is a folder, but the stack is one file; give the labels as one file of its shape"
        )
    names = like.source.names
    index_of = {Path(name).stem: i for i, name in enumerate(names)} | {name: i for i, name in enumerate(names)}
    matched: dict[int, Path] = {}
    files = [p for p in path.iterdir() if is_geojson(p) and not p.name.startswith(".")]
    for file in sorted(files, key=lambda p: natural_key(p.name)):
        ending = max((e for e in GEOJSON_ENDINGS if file.name.lower().endswith(e)), key=len)
        index = index_of.get(file.name[: -len(ending)])
        if index is None:
            raise ValueError(
                f"read_labels(): {file.name} in {path} is named like no section of {like.source.path}; name each label "
                f"file like its image (the first is {names[0]})"
            )
        if index in matched:
            raise ValueError(f"read_labels(): {path} holds both {matched[index].name} and {file.name}; keep one")
        matched[index] = file
    return matched


def _table_of(objects: dict[int, list[Outline]]) -> LabelTable:
    names = sorted({o.class_name or UNCLASSIFIED for outlines in objects.values() for o in outlines})
    return {i: Label(name, default_colour(i)) for i, name in enumerate(names, start=1)}
