"""``limner info``: what a file or folder holds."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.arguments import SectionAxis

if TYPE_CHECKING:  # so that `limner -h` need not wait for numpy
    from numpy.typing import NDArray

    from limner.io.content import Content

FEW_VALUES = 64


@dataclass(frozen=True)
class Info:
    """Print what a file or folder of images or labels holds: format, shape, spacing, values; structures of labels.

    Of a model that Limner trained it prints what it is for, its settings and how it was trained.
    """

    path: Annotated[Positional[Path], arg(metavar="PATH")]
    """A folder of PNG, TIFF or JPEG sections, a multi-page TIFF, a NIfTI, NRRD, MHA or MGZ volume, or a model."""
    labels: FlagCreatePairsOff[bool] = False
    """It holds labels: list the labelled sections, and the pixels of each structure."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint="(default: none)")] = None
    """Names of the structures: ITK-SNAP, FreeSurfer or CSV (index,name,r,g,b); used with --labels."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""

    def run(self, command_line: Sequence[str]) -> int:
        """Print the facts, one a line."""
        del command_line
        for line in describe_model(self.path) if self.path.suffix == ".safetensors" else describe(self):
            print(line)
        return 0


def describe_model(path: Path) -> Iterator[str]:
    """Lines that say what a model is for, how it is set and how it was trained."""
    from limner.model_file import read_model

    model = read_model(path)
    yield f"{path}: model for {model.task}"
    is_prior = model.task == "anatomical prior"
    if not is_prior:
        yield "pixel size: not stated" if math.isnan(model.pixel_size) else f"pixel size: {model.pixel_size:g} um"
    if names := model.settings.get("names"):  # of organs, which are drawn by numbers
        marks = ", ".join(f"{mark} {name}" for mark, name in enumerate(names, start=2))
        yield f"marks to draw: 1 background, {marks}"
    settings, record = dict(model.settings), dict(model.record)
    if is_prior:
        yield from _describe_prior(settings, record, model.weights["location"].shape[1:])
    yield f"settings: {_listed({name: v for name, v in settings.items() if not isinstance(v, dict)})}"
    yield from (f"{name}: {_listed(value)}" for name, value in settings.items() if isinstance(value, dict))
    for name, value in record.items():
        if name == "losses":
            yield f"loss: {value[0]:.4g} at first, {value[-1]:.4g} in the end"
        elif name == "inputs":
            yield from (f"{_origin(what)}: {', '.join(files)}" for what, files in value.items() if files)
        elif isinstance(value, dict):
            yield f"{name}: {_listed(value.get('mean', value))}"
        elif isinstance(value, list):
            yield f"{name}: {', '.join(map(str, value))}"
        elif value is not None:
            yield f"{name}: {value}"


def _describe_prior(settings: dict[str, Any], record: dict[str, Any], grid: Sequence[int]) -> Iterator[str]:
    """Structures, label maps, template and scans; takes what it tells of out of settings and record."""
    _, *structures = settings.pop("structures")
    yield f"structures: {len(structures)}"
    yield from (f"  {labels[0]:>6}  {name}: labels {_first(labels)}" for name, labels in structures)
    spacing = settings.pop("space")["spacing"][0]
    maps, overlaps = record.pop("label_maps", []), record.pop("overlaps", {})
    least = f", overlaps of brains from {min(overlaps.values()):.2f}" if overlaps else ""
    yield f"label maps: {len(maps)}{least}"
    yield from (f"left out: {name}: {why}" for name, why in record.pop("left_out", {}).items())
    size = " x ".join(map(str, grid))
    yield f"template: {record.pop('template', 'not stated')}, {size} voxels (z, y, x) of {spacing:g} mm"
    scans, losses = record.pop("fitted_to", []), record.pop("fitted_loss", [])
    yield f"fitted to scans: {', '.join(scans) or 'none; `limner prior segment` fits it to those that it is given'}"
    if losses:
        yield f"loss of scans: {losses[0]:.4g} at first, {losses[-1]:.4g} in the end"
    for name in ("colours", "fit_key"):
        record.pop(name, None)


def _first(labels: Sequence[int], shown: int = 10) -> str:
    more = f" and {len(labels) - shown} more" if len(labels) > shown else ""
    return ", ".join(map(str, labels[:shown])) + more


def _origin(what: str) -> str:
    return f"scored on {what}" if what.startswith("validation") else f"made from {what}"


def _listed(values: Mapping[str, Any]) -> str:
    return ", ".join(
        f"{name} {value:.4g}" if isinstance(value, float) else f"{name} {value}" for name, value in values.items()
    )


def describe(info: Info) -> Iterator[str]:
    """Lines that say what the path holds."""
    import numpy as np

    from limner.io.images import axis_number, load

    content = load(info.path, labels=info.labels).with_sections_first(axis_number(info.section_axis, info.path))
    yield from _describe_grid(info.path, content)
    pixels = content.pixels
    if info.labels:
        yield from _describe_labels(info, pixels)
        return
    if np.issubdtype(pixels.dtype, np.floating) and not np.isfinite(pixels).all():
        yield f"values: {np.count_nonzero(~np.isfinite(pixels))} pixels are NaN or infinite"
    else:
        yield f"values: {pixels.min()} to {pixels.max()}"
    if pixels.ndim == 3 and np.issubdtype(pixels.dtype, np.integer) and len(np.unique(pixels)) <= FEW_VALUES:
        yield "few values: if these are labels, `limner info --labels` lists their structures"


def _describe_grid(path: Path, content: Content) -> Iterator[str]:
    source, shape = content.source, content.pixels.shape
    kind = {"volume": "volume", "tiff": "multi-page TIFF", "folder": "folder of sections", "ome-zarr": "OME-Zarr"}[
        source.kind
    ]
    yield f"{path}: {kind} ({source.extension})"
    yield f"sections: {shape[0]}"
    yield f"size of a section: {shape[1]} x {shape[2]} pixels (y, x)"
    if len(set(source.sizes)) > 1:
        yield f"sections differ in size: {min(source.sizes)} to {max(source.sizes)} pixels, centred on the largest"
    if source.names:
        yield f"names: {source.names[0]} to {source.names[-1]}"
    yield f"channels: {'3 (RGB)' if content.pixels.ndim == 4 else '1 (grey)'}"
    yield f"data type: {content.pixels.dtype}"
    if content.spacing is None:
        yield "spacing: not stated by the file; give --spacing z,y,x"
    else:
        yield "spacing: " + ", ".join(f"{s:.6g}" for s in content.spacing) + " mm (z, y, x)"


def _describe_labels(info: Info, pixels: NDArray[Any]) -> Iterator[str]:
    import numpy as np

    from limner.io import read_table
    from limner.io.labels import as_labels

    labels = as_labels(pixels, info.path)
    table = read_table(info.label_table)[0] if info.label_table is not None else {}
    labelled = np.flatnonzero(labels.any(axis=(1, 2))).tolist()
    yield f"sections with labels: {len(labelled)} ({', '.join(map(str, labelled)) or 'none'})"
    values, counts = np.unique(labels, return_counts=True)
    present = [(int(v), int(c)) for v, c in zip(values, counts, strict=True) if v > 0]
    yield f"structures: {len(present)}"
    for label, count in present:
        name = table[label].name if label in table else f"label {label}"
        yield f"  {label:>6}  {name}: {count} pixels"
