"""What the report of `limner prior segment` is made from."""

from __future__ import annotations

from pathlib import Path

import numpy as np

from limner.cli.prior_results import Result, Truth, scan_view
from limner.io import write_result
from limner.label_merging import each_label
from limner.space import Space
from limner.volume import Label, Volume


def test_views_hold_the_labelled_part_alone(tmp_path: Path) -> None:
    space = Space((60, 20, 24), (1.0, 2.0, 1.5), (3.0, 4.0, 5.0))
    labels, draw = np.zeros(space.shape, np.int32), np.random.default_rng(0)
    labels[20:30] = 7  # across whole sections: of these a slice is a view
    scan = Volume(draw.integers(1, 99, space.shape).astype(np.int16), space)
    image = write_result(tmp_path / "scans", "s", scan.pixels, scan)
    files = [
        write_result(tmp_path / "labels", "s", labels, scan),
        write_result(tmp_path / "uncertainty", "s", np.full(space.shape, 0.5, np.float32), scan),
    ]
    names = tuple(path.relative_to(tmp_path).as_posix() for path in files)
    result = Result(names, 0.9, {"7": (1.0, 0.5, 2.0)}, 0.5)
    view = scan_view(tmp_path, "s", image, result, Truth(), (each_label([7]), {7: Label("seven", (1, 2, 3))}))
    margin = 2  # a share of the longest side, 40 mm
    assert view.space.shape == view.image.shape == view.labels.shape == (10 + 2 * margin, 20, 24)
    assert view.space.origin == (3.0 + 20 - margin, 4.0, 5.0)
    np.testing.assert_array_equal(view.image, scan.pixels[18:32])
    assert view.labels.dtype == np.uint8
    assert all(maps.base is None for maps in (view.image, view.labels, view.uncertainty))
