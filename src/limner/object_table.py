"""The table of objects: place, size, shape and stain of each, written as a stream."""

from __future__ import annotations

import csv
import importlib
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray
from skimage.color import rgb2hed

TABLE_ENDINGS = (".csv", ".parquet")
COLUMNS = (
    "label",
    "centroid_y_px",
    "centroid_x_px",
    "centroid_y_um",
    "centroid_x_um",
    "area_um2",
    "eccentricity",
    "mean_haematoxylin",
    "mean_probability",
)


def object_table(
    labels: NDArray[np.integer[Any]],
    image: NDArray[np.uint8] | None,
    um_per_px: tuple[float, float],
    offset: tuple[int, int] = (0, 0),
) -> dict[str, NDArray[Any]]:
    """Measure the objects of a label image, or of one region of it that holds them whole.

    Parameters
    ----------
    labels : ndarray of int
        Shape (Y, X); 0 is background.
    image : ndarray of uint8, optional
        Shape (Y, X, 3), the same region in RGB; without it haematoxylin is NaN.
    um_per_px : tuple of float
        Size of a pixel (y, x) in micrometres.
    offset : tuple of int
        Position (y, x) of the first pixel in the full image.

    Returns
    -------
    dict of str to ndarray
        One entry for each of `COLUMNS`, all of one length, by increasing label: the label; the centroid in pixels of
        the full image (0 is the middle of the first pixel) and in micrometres from its corner; the area in um2;
        the eccentricity of the ellipse of equal second moments, 0 to 1; the mean of the haematoxylin channel of
        scikit-image's `rgb2hed`; and ``mean_probability``, NaN here, for whoever knows how sure the objects are.

    Raises
    ------
    ValueError
        If the image is of another shape.

    References
    ----------
    Ruifrok and Johnston (2001), colour deconvolution; the stain vectors are those of scikit-image.

    Examples
    --------
    >>> labels = np.zeros((6, 8), int); labels[2:4, 3:6] = 9
    >>> table = object_table(labels, None, (0.5, 0.5), offset=(100, 0))
    >>> table["label"].tolist(), table["area_um2"].tolist(), table["centroid_y_px"].tolist()
    ([9], [1.5], [102.5])
    """
    if image is not None and image.shape != (*labels.shape, 3):
        raise ValueError(
            f"object_table(): the image has shape {image.shape}, the labels {labels.shape}; give RGB of the same size"
        )
    # all objects at once, for scikit-image's regionprops asks a millisecond of each
    (size_y, size_x), (rows, columns) = um_per_px, np.nonzero(labels)
    values, index = np.unique(labels[rows, columns], return_inverse=True)
    n_pixels = np.bincount(index, minlength=len(values))

    def mean(of_pixels: NDArray[Any]) -> NDArray[np.float64]:
        return np.bincount(index, of_pixels, len(values)) / n_pixels

    y, x = mean(rows), mean(columns)
    # in micrometres, so that pixels that are not square do not stretch the ellipse
    dy, dx = (rows - y[index]) * size_y, (columns - x[index]) * size_x
    unknown = np.full(len(values), np.nan)
    found = (
        values,
        y + offset[0],
        x + offset[1],
        (y + offset[0] + 0.5) * size_y,
        (x + offset[1] + 0.5) * size_x,
        n_pixels * size_y * size_x,
        _eccentricity(mean(dy * dy), mean(dx * dx), mean(dy * dx)),
        unknown if image is None else mean(rgb2hed(image[rows, columns])[:, 0]),
        unknown,
    )
    return dict(zip(COLUMNS, found, strict=True))


def _eccentricity(yy: NDArray[np.float64], xx: NDArray[np.float64], yx: NDArray[np.float64]) -> NDArray[np.float64]:
    """Of ellipses with these second moments about their centres; 0 where an object is one pixel."""
    middle, half = (yy + xx) / 2, np.hypot((yy - xx) / 2, yx)
    shortest, longest = np.clip(middle - half, 0, None), middle + half
    return np.sqrt(1 - np.divide(shortest, longest, out=np.ones_like(longest), where=longest > 0))


class ObjectTableStream:
    """A table of objects, written part after part.

    It gets its name when the ``with`` block ends without an error; until then it lies beside it as ``.partial-NAME``.

    Parameters
    ----------
    path : str or Path
        ``.csv``, or ``.parquet`` where pyarrow is installed. An earlier table is replaced once the new one is complete.

    Raises
    ------
    ValueError
        If the ending is another, or pyarrow is missing.

    Examples
    --------
    >>> import tempfile
    >>> labels = np.eye(3, dtype=int)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     with ObjectTableStream(f"{folder}/a.csv") as stream:
    ...         stream.append(object_table(labels, None, (1.0, 1.0)))
    ...     Path(folder, "a.csv").read_text().splitlines()[1]
    '1,1.0,1.0,1.5,1.5,3.0,1.0,,'
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if self.path.suffix.lower() not in TABLE_ENDINGS:
            raise ValueError(f"ObjectTableStream(): {self.path} must end in {' or '.join(TABLE_ENDINGS)}")
        self._partial = self.path.with_name(f".partial-{self.path.name}")
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._arrow: Any = None
        self._schema: Any = None
        self._writer: Any = None
        if self.path.suffix.lower() == ".parquet":
            self._arrow, self._schema = _arrow_schema(self.path)
            self._writer = self._arrow.parquet.ParquetWriter(self._partial, self._schema)
            return
        with self._partial.open("w", encoding="utf-8", newline="") as file:
            csv.writer(file, lineterminator="\n").writerow(COLUMNS)

    def append(self, table: dict[str, NDArray[Any]]) -> None:
        """Add the rows of `object_table`. In CSV values have four digits after the point, NaN is empty."""
        if self._writer is not None:
            if len(table["label"]):
                self._writer.write_table(self._arrow.table({c: table[c] for c in COLUMNS}, schema=self._schema))
            return
        with self._partial.open("a", encoding="utf-8", newline="") as file:
            rows = zip(*(table[c].tolist() for c in COLUMNS), strict=True)
            csv.writer(file, lineterminator="\n").writerows([_text(value) for value in row] for row in rows)

    def __enter__(self) -> ObjectTableStream:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._writer is not None:
            self._writer.close()
        if error is None:
            self._partial.replace(self.path)


def _text(value: float) -> str:
    if value != value:
        return ""
    return str(value) if isinstance(value, int) else str(round(value, 4))


def _arrow_schema(path: Path) -> tuple[Any, Any]:
    try:
        arrow = importlib.import_module("pyarrow")
        importlib.import_module("pyarrow.parquet")
    except ImportError:
        raise ValueError(
            f"ObjectTableStream(): {path} needs pyarrow, which is not installed; pip install limner[parquet], or write "
            "a .csv"
        ) from None
    types = {column: arrow.int64() if column == "label" else arrow.float64() for column in COLUMNS}
    return arrow, arrow.schema(list(types.items()))
