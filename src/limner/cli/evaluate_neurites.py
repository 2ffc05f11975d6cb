"""``limner evaluate neurites``: V_rand, V_info, Rand, warping and pixel error of membranes or cells."""

from __future__ import annotations

import json
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.arguments import Indices, SectionAxis
from limner.cli.evaluate import check_json_file

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from limner.metrics.neurites import CellScore, MapScore, NeuriteScores
    from limner.volume import Source, Volume

    Sections = list[NDArray[Any]]

ROWS = {  # of the printed table, with the score at whose best threshold each is shown
    "v_rand": ("V_rand (thinned)", "v_rand"),
    "v_rand_split": ("  split", "v_rand"),
    "v_rand_merge": ("  merge", "v_rand"),
    "v_info": ("V_info (thinned)", "v_info"),
    "v_info_split": ("  split", "v_info"),
    "v_info_merge": ("  merge", "v_info"),
    "rand_error": ("Rand error", "rand_error"),
    "warping_error": ("warping error", "warping_error"),
    "splits": ("  splits", "warping_error"),
    "mergers": ("  mergers", "warping_error"),
    "others": ("  holes, islands", "warping_error"),
    "pixel_error": ("pixel error", "pixel_error"),
}
FEW_VALUES = 5  # labels of fewer cells are not told from a map in steps
ANY_SPACING = (1.0, 1.0, 1.0)  # in mm; no score depends on it


@dataclass(frozen=True)
class EvaluateNeurites:
    """V_rand, V_info, Rand error, warping error and pixel error of membranes, or of the cells between them.

    Each section is scored by itself, in 2D. A probability map is scored at the thresholds 0.05, 0.10, ... 0.95; the
    table shows each score at the threshold that is best for all sections together, and at 0.5. V_rand and V_info
    (1 is perfect) thin the predicted membranes first, as Arganda-Carreras et al. (2015) do; the Rand error of the
    ISBI 2012 challenge (0 is perfect, as for all errors) does not. The splits and mergers are those that remain when
    the truth's borders were moved towards the prediction's by up to `--reach` pixels.
    """

    predicted: Annotated[Positional[Path], arg(metavar="PRED")]
    """Probabilities from 0 to 1 or of 8 bit, or labels: a folder of sections, a multi-page TIFF, or a volume."""
    truth: Annotated[Positional[Path], arg(metavar="TRUTH")]
    """Truth: a file of the same shape, or a folder of some of PRED's sections under the same names."""
    pred_is: Literal["membrane", "inside", "cells"] = "membrane"
    """What PRED holds: probabilities of membrane, or of the inside of cells; or labels of cells, 0 between them."""
    truth_is: Literal["cells", "membrane"] = "cells"
    """What is above 0 in TRUTH: cells (labels, or a binary image whose membranes are 0), or the membranes."""
    sections: Annotated[Indices, arg(help_behavior_hint="(default: those that TRUTH holds)")] = ()
    """Sections to score: indices from 0; 15-19 and 0-250:10 (every tenth) work too."""
    reach: float = 5.0
    """Pixels by which the truth's borders may be moved for the warping error; inf: without limit, as in ISBI 2012."""
    json: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Also write all scores, at every threshold and of every section, to this new file."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace the file named by --json where there is one."""

    def run(self, command_line: Sequence[str]) -> int:
        """Score, print the table, write the JSON file."""
        del command_line
        if not self.reach >= 0:
            raise ValueError(f"--reach: {self.reach} is no distance; give pixels, 0 or more, or inf")
        if self.json is not None:
            check_json_file(self.json, self.overwrite)
        names, score = score_files(self)
        print_scores(score, len(names))
        if self.json is not None:
            _write_json(self.json, score, names)
        return 0


def score_files(command: EvaluateNeurites) -> tuple[list[str], MapScore | CellScore]:
    """Read the prediction and the truth and score them; with the names of the sections.

    Raises
    ------
    ValueError
        If a file cannot be read, the two do not fit, or PRED does not hold what `pred_is` says.
    """
    from limner.io import read, read_label_volume, read_labels
    from limner.metrics.neurites import cells_of_labels, score_cells, score_maps
    from limner.volume import LabelMap

    axis = command.section_axis
    stack: Volume | LabelMap
    if command.pred_is == "cells":
        stack = read_label_volume(command.predicted, spacing=ANY_SPACING, section_axis=axis)
    else:
        stack = read(command.predicted, spacing=ANY_SPACING, section_axis=axis)
    truth = read_labels(command.truth, stack, labelled=command.sections or None, section_axis=axis)
    labels = _sections(truth.label_map.labels, stack.source, truth.labelled)
    true_cells = [section == 0 if command.truth_is == "membrane" else cells_of_labels(section) for section in labels]
    _warn_of_polarity(command.truth, true_cells, "--truth-is")
    names = [stack.source.names[i] if stack.source and stack.source.names else str(i) for i in truth.labelled]
    pixels = stack.labels if isinstance(stack, LabelMap) else stack.pixels
    found = _sections(pixels, stack.source, truth.labelled)
    if command.pred_is == "cells":
        return names, score_cells([cells_of_labels(section) for section in found], true_cells, command.reach)
    maps = _probabilities(found, command)
    _warn_of_polarity(command.predicted, [section < 0.5 for section in maps], "--pred-is")
    return names, score_maps(maps, true_cells, reach=command.reach)


def _sections(pixels: NDArray[Any], source: Source | None, indices: Sequence[int]) -> Sections:
    """The sections of these indices, each of its own size where a folder holds several sizes."""
    from limner.io.sections import centre_slices

    sizes = source.sizes if source is not None and source.sizes else [pixels.shape[1:3]] * len(pixels)
    return [pixels[i][centre_slices(sizes[i], pixels.shape[1:3])] for i in indices]


def _probabilities(sections: Sections, command: EvaluateNeurites) -> Sections:
    """Probabilities of membrane in [0, 1]; of 8 bit, 255 is 1, and so is 1 where nothing is above it."""
    import numpy as np

    kind, found = sections[0].dtype, f"PRED: {command.predicted}"
    if sections[0].ndim != 2:
        raise ValueError(f"{found} is RGB; give probabilities, one number a pixel")
    lowest, highest = min(float(s.min()) for s in sections), max(float(s.max()) for s in sections)
    if kind != np.uint8 and not (kind.kind == "f" and lowest >= 0 and highest <= 1):
        raise ValueError(
            f"{found} holds {kind} from {lowest:g} to {highest:g}; give probabilities, as floating point numbers from "
            "0 to 1 or of 8 bit, or add --pred-is cells for labels"
        )
    if kind == np.uint8 and _change_through_0(sections):
        warnings.warn(f"{command.predicted} looks like labels of cells; add --pred-is cells if it is", stacklevel=2)
    scale = 255 if kind == np.uint8 and highest > 1 else 1
    probabilities = [section.astype(np.float32) / scale for section in sections]
    if highest < scale / 2:
        warnings.warn(
            f"no probability of {command.predicted} reaches 0.5; add --pred-is cells if it holds labels", stacklevel=2
        )
    return [1 - p for p in probabilities] if command.pred_is == "inside" else probabilities


def _change_through_0(sections: Sections) -> bool:
    """Whether there are many values, and one never lies beside another but 0: so do labels, parted by lines of 0."""
    import numpy as np

    if len({int(value) for section in sections for value in np.unique(section)}) < FEW_VALUES:
        return False
    pairs = [(s[:, 1:], s[:, :-1]) for s in sections]
    changes = sum(int((a != b).sum()) for a, b in pairs)
    return sum(int(((a != b) & (a > 0) & (b > 0)).sum()) for a, b in pairs) < 0.01 * changes


def _warn_of_polarity(path: Path, cells: Sections, option: str) -> None:
    """Membranes are thin: a stack that is membrane for the greater part is most likely taken the wrong way round."""
    membrane = 1 - sum(int(c.sum()) for c in cells) / sum(c.size for c in cells)
    if membrane > 0.5:
        warnings.warn(f"{membrane:.0%} of {path} is membrane as {option} has it; is that option right?", stacklevel=2)


def print_scores(score: MapScore | CellScore, n_sections: int) -> None:
    """Print a table of the scores: of labels one column, of a map the best, its threshold, and at 0.5."""
    from rich.console import Console
    from rich.table import Table

    from limner.metrics.neurites import MapScore

    is_map = isinstance(score, MapScore)
    table = Table(f"{n_sections} section{'s' * (n_sections > 1)}", box=None, pad_edge=False)
    for title in ("best", "at", "at 0.5") if is_map else ("score",):
        table.add_column(title, justify="right")
    for name, (title, whole) in ROWS.items():
        table.add_row(title, *_numbers(name, whole, score))
    Console(highlight=False, markup=False).print(table)


def _numbers(name: str, whole: str, score: MapScore | CellScore) -> list[str]:
    from limner.metrics.neurites import MapScore

    if not isinstance(score, MapScore):
        return [_shown(score.overall, name)]
    threshold, best = score.best(whole)
    return [_shown(best.overall, name), f"{threshold:.2f}", _shown(score.at_half.overall, name)]


def _shown(scores: NeuriteScores, name: str) -> str:
    value = getattr(scores, name)
    if isinstance(value, int):
        return str(value)
    digits = 5 if name == "warping_error" else 4
    return "-" if value != value else f"{value:.{digits}f}"  # NaN is unequal to itself


def _write_json(path: Path, score: MapScore | CellScore, names: Sequence[str]) -> None:
    from limner.metrics.neurites import MapScore
    from limner.run_record import write_atomically

    content = _map_json(score, names) if isinstance(score, MapScore) else _cells_json(score, names)
    text = json.dumps(content, indent=2, allow_nan=False)
    write_atomically(path, lambda handle: handle.write(text.encode() + b"\n"))


def _cells_json(score: CellScore, names: Sequence[str]) -> dict[str, Any]:
    sections = {name: s.to_json() for name, s in zip(names, score.sections, strict=True)}
    return {"overall": score.overall.to_json(), "sections": sections}


def _map_json(score: MapScore, names: Sequence[str]) -> dict[str, Any]:
    best = {name: score.best(name) for name, (_, whole) in ROWS.items() if name == whole}
    return {
        "best": {name: {"threshold": at, **there.overall.to_json()} for name, (at, there) in best.items()},
        "at_half": _cells_json(score.at_half, names),
        "thresholds": [
            {"threshold": at, **_cells_json(there, names)} for at, there in zip(score.thresholds, score.at, strict=True)
        ],
    }
