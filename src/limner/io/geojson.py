"""QuPath's GeoJSON: objects read from it, and written to it as a stream.

The schema is that of QuPath 0.5 (`GsonTools`, `QuPathTypeAdapters`): a FeatureCollection, each feature with a UUID as
`id`, a Polygon or MultiPolygon in pixels of the full resolution, and the properties `objectType` (``detection`` or
``annotation``), `classification` (`name`, `color` as [r, g, b]) and `measurements` (name to number). QuPath opens such
a file, also gzipped, by dropping it onto an image, or by File > Import objects.
"""

from __future__ import annotations

import gzip
import io
import json
import zlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, cast
from uuid import NAMESPACE_URL, uuid5

import numpy as np
from numpy.typing import NDArray

from limner.io.outlines import Outline, Ring, fill_all
from limner.volume import LabelTable

GEOJSON_ENDINGS = (".geojson", ".json", ".geojson.gz", ".json.gz")
UNCLASSIFIED = "unclassified"
MEAN_PROBABILITY = "Probability mean"  # the measurement by which Limner knows what it found itself
NO_AREA = ("Point", "MultiPoint", "LineString", "MultiLineString")


def read_objects(path: str | Path, nuclei: bool = False) -> list[Outline]:
    """Read the objects of a QuPath GeoJSON file.

    Parameters
    ----------
    path : str or Path
        ``.geojson`` or ``.json``, gzipped where ``.gz`` follows: a FeatureCollection, a list of features or a single
        feature.

    Returns
    -------
    list of Outline
        In the file's order, labels from 1. Points and lines, which have no area, are passed over; of a cell the outer
        outline is taken. The classification may be an object with `name`, a list of `names`, or a text.

    Raises
    ------
    ValueError
        If the file is damaged or is no GeoJSON of features, or a polygon is malformed; the feature is named.

    Examples
    --------
    >>> import tempfile
    >>> ring = [[1, 1], [3, 1], [3, 2], [1, 2], [1, 1]]
    >>> feature = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring]}, "properties": {}}
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     file = Path(folder, "a.geojson")
    ...     _ = file.write_text(json.dumps(feature))
    ...     read_objects(file)[0].area
    2.0
    """
    path = Path(path)
    content = _load(path)
    features = content
    if isinstance(content, Mapping):
        features = content.get("features") if content.get("type") == "FeatureCollection" else [content]
    if not isinstance(features, list):
        raise ValueError(f"read_objects(): {path} is no GeoJSON of features; export a FeatureCollection")
    objects: list[Outline] = []
    for number, feature in enumerate(features, start=1):
        try:
            polygons = _polygons(feature, nuclei)
            if polygons:
                objects.append(Outline(polygons, len(objects) + 1, _class_name(feature), _found(feature)))
        except (AttributeError, KeyError, TypeError, ValueError) as error:
            raise ValueError(
                f"read_objects(): feature {number} of {path} is no polygon that can be used: {error}"
            ) from None
    return objects


def rasterise(
    objects: Sequence[Outline], shape: tuple[int, int], classes: Mapping[str, int] | None = None
) -> NDArray[np.int32]:
    """Label image of objects, by the rule that a pixel belongs to an object where its centre does.

    Parameters
    ----------
    objects : sequence of Outline
        Where they overlap the smaller lies on top.
    shape : tuple of int
        (Y, X); what lies outside is cut off.
    classes : mapping of str to int, optional
        Label of each class; objects without one are of the class ``unclassified``. Without it each object gets its own
        label, `Outline.label`.

    Returns
    -------
    ndarray of int32
        Shape (Y, X), 0 where there is no object.

    Raises
    ------
    ValueError
        If an object's class is not in `classes`.

    Examples
    --------
    >>> square = np.array([[0.0, 0.0], [2.0, 0.0], [2.0, 1.0], [0.0, 1.0]])
    >>> rasterise([Outline(((square,),), 1, "nucleus")], (2, 3), {"nucleus": 4})
    array([[4, 4, 0],
           [0, 0, 0]], dtype=int32)
    """
    if classes is None:
        return fill_all(objects, [o.label for o in objects], shape)
    unknown = sorted({o.class_name or UNCLASSIFIED for o in objects} - set(classes))
    if unknown:
        raise ValueError(
            f"rasterise(): there are objects of the class {unknown[0]!r}, but the table has {', '.join(classes)}; add "
            "it to the table"
        )
    return fill_all(objects, [classes[o.class_name or UNCLASSIFIED] for o in objects], shape)


class GeoJsonStream:
    """Objects written one after another into a GeoJSON file that QuPath opens.

    The file gets its name when the ``with`` block ends without an error; until then, and after an error, it lies beside
    it as ``.partial-NAME``, which the next stream of this name replaces.

    Parameters
    ----------
    path : str or Path
        ``.geojson``, or ``.geojson.gz`` for a compressed file; an earlier one is replaced once the new one is complete.
    object_type : {'detection', 'annotation'}
        Detections are light (QuPath holds millions), annotations can be edited.
    class_name : str
        Classification of objects that have none of their own.
    table : mapping of int to Label, optional
        Where given, an object's label is its class: its name and colour are taken from here.

    Raises
    ------
    ValueError
        If the ending is another.

    Examples
    --------
    >>> import tempfile
    >>> from limner.io.outlines import trace
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with GeoJsonStream(f"{folder}/a.geojson.gz", class_name="nucleus") as stream:
    ...         stream.write(trace(np.eye(3, dtype=int) * 7), {7: {"Area um^2": 0.75}})
    ...     [outline.class_name for outline in read_objects(f"{folder}/a.geojson.gz")]
    ['nucleus']
    """

    def __init__(
        self,
        path: str | Path,
        object_type: Literal["detection", "annotation"] = "detection",
        class_name: str = "object",
        table: LabelTable | None = None,
    ) -> None:
        self.path = Path(path)
        if not self.path.name.lower().endswith(GEOJSON_ENDINGS):
            raise ValueError(f"GeoJsonStream(): {self.path} must end in {' or '.join(GEOJSON_ENDINGS)}")
        self._object_type, self._class_name, self._table = object_type, class_name, table
        self._partial = self.path.with_name(f".partial-{self.path.name}")
        self._count = 0
        self._file = self._open()

    def _open(self) -> IO[str]:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if self.path.suffix.lower() == ".gz":
            # without a time, so that equal results are equal files
            binary = gzip.GzipFile(self._partial, "wb", 6, mtime=0)
            file: IO[str] = io.TextIOWrapper(cast(IO[bytes], binary), encoding="utf-8", newline="\n")
        else:
            file = self._partial.open("w", encoding="utf-8", newline="\n")
        file.write('{"type":"FeatureCollection","features":[')
        return file

    def write(self, outlines: Iterable[Outline], measurements: Mapping[int, Mapping[str, float]] | None = None) -> None:
        """Add objects, with the measurements of each label where there are any; NaN and infinity are left out."""
        for outline in outlines:
            self._count += 1
            feature = self._feature(outline, (measurements or {}).get(outline.label, {}))
            text = json.dumps(feature, separators=(",", ":"), ensure_ascii=False)
            self._file.write(f"{',' if self._count > 1 else ''}\n{text}")

    def _feature(self, outline: Outline, measurements: Mapping[str, float]) -> dict[str, Any]:
        name, colour = outline.class_name or self._class_name, None
        if self._table is not None and outline.label in self._table:
            name, colour = self._table[outline.label].name, self._table[outline.label].colour
        classification: dict[str, Any] = {"name": name}
        if colour is not None:
            classification["color"] = list(colour)
        properties: dict[str, Any] = {"objectType": self._object_type, "classification": classification}
        finite = {key: float(value) for key, value in measurements.items() if np.isfinite(value)}
        if finite:
            properties["measurements"] = finite
        # the same result gives the same file, so the id is made from the object's place and not drawn
        identity = uuid5(NAMESPACE_URL, f"limner:{self.path.name}:{self._count}:{outline.label}")
        return {"type": "Feature", "id": str(identity), "geometry": _geometry(outline), "properties": properties}

    def __enter__(self) -> GeoJsonStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if error is not None:
            self._file.close()
            return
        self._file.write("\n]}\n")
        self._file.close()
        self._partial.replace(self.path)


def is_geojson(path: Path) -> bool:
    """Whether a file's name ends as GeoJSON does."""
    return path.name.lower().endswith(GEOJSON_ENDINGS)


def _load(path: Path) -> Any:
    try:
        with gzip.open(path, "rb") if path.suffix.lower() == ".gz" else path.open("rb") as file:
            return json.loads(file.read())
    except (OSError, EOFError, ValueError, RecursionError, zlib.error) as error:
        raise ValueError(f"read_objects(): {path} cannot be read (truncated, or no GeoJSON?): {error}") from None


def _polygons(feature: Mapping[str, Any], nuclei: bool) -> tuple[tuple[Ring, ...], ...]:
    """Rings of every polygon of a feature; none where its geometry has no area."""
    if feature.get("type") != "Feature":
        raise ValueError(f"its type is {feature.get('type')!r}, not 'Feature'")
    nucleus = feature.get("nucleusGeometry") if nuclei else None
    return _polygons_of(nucleus or feature["geometry"])


def _polygons_of(geometry: Mapping[str, Any]) -> tuple[tuple[Ring, ...], ...]:
    kind = geometry["type"]
    if kind in NO_AREA:
        return ()
    if kind == "GeometryCollection":
        return tuple(polygon for part in geometry["geometries"] for polygon in _polygons_of(part))
    if kind not in ("Polygon", "MultiPolygon"):
        raise ValueError(f"its geometry is {kind!r}")
    parts = [geometry["coordinates"]] if kind == "Polygon" else geometry["coordinates"]
    return tuple(tuple(_ring(ring) for ring in part) for part in parts if part)


def _ring(points: Any) -> Ring:
    ring = np.asarray([point[:2] for point in points], float)
    if len(ring) > 1 and (ring[0] == ring[-1]).all():
        ring = ring[:-1]
    if len(ring) < 3 or not np.isfinite(ring).all():
        raise ValueError("a ring needs three points or more, all numbers")
    return ring


def _found(feature: Mapping[str, Any]) -> bool:
    return MEAN_PROBABILITY in ((feature.get("properties") or {}).get("measurements") or ())


def _class_name(feature: Mapping[str, Any]) -> str | None:
    classification = (feature.get("properties") or {}).get("classification")
    if isinstance(classification, Mapping):
        names = classification.get("names") or [classification.get("name")]
        return ": ".join(str(name) for name in names if name) or None
    return str(classification) if classification else None


def _geometry(outline: Outline) -> dict[str, Any]:
    parts = [[_closed(ring) for ring in rings] for rings in outline.polygons]
    if len(parts) == 1:
        return {"type": "Polygon", "coordinates": parts[0]}
    return {"type": "MultiPolygon", "coordinates": parts}


def _closed(ring: Ring) -> list[list[float]]:
    # whole numbers without ".0": files are a third smaller
    points = [[int(v) if v == int(v) else round(v, 3) for v in point] for point in ring.tolist()]
    return [*points, points[0]]
