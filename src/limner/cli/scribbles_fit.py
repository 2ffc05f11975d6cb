"""``limner scribbles fit``: check everything, train on volumes that are labelled in full, write the model."""

from __future__ import annotations

import dataclasses
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import FlagCreatePairsOff, arg
from tyro.constructors import PrimitiveConstructorSpec

from limner.cli.arguments import SectionAxis, Spacing
from limner.cli.device import find_device
from limner.cli.image_files import hash_stack
from limner.cli.model_output import check_model_path, thinned
from limner.cli.progress import progress_on
from limner.io import read, read_label_volume, read_table
from limner.run_record import content_key, package_versions, to_plain, utc_now
from limner.scribble_settings import Settings
from limner.stroke_network import LabelledVolume, Model, fit, to_model
from limner.volume import LabelMap, Volume

NONE = "(default: none)"
MOST_ORGANS = 64  # files with more labels than that hold an image, or an atlas of which organs are to be chosen
UNLIKE = 1.2  # times the size of the smallest pixels


def parse_organs(text: str) -> tuple[int, ...]:
    """Labels of organs, in the order given, from numbers separated by commas.

    Raises
    ------
    ValueError
        If the text is of another form, or names 0 or a label twice.

    Examples
    --------
    >>> parse_organs("12,3")
    (12, 3)
    """
    parts = [part.strip() for part in text.split(",")]
    if not all(re.fullmatch(r"\d+", part) for part in parts):
        raise ValueError(f"{text!r} is no list of labels; give numbers above 0, like 3,12")
    organs = tuple(int(part) for part in parts)
    if 0 in organs or len(set(organs)) < len(organs):
        raise ValueError(f"{text!r} names background (0) or a label twice; give each organ's label once")
    return organs


Organs = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="3,12",
        instance_from_str=lambda texts: parse_organs(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda organs: [",".join(map(str, organs))],
    ),
]


@dataclass(frozen=True)
class ScribblesFit:
    """Train a model on volumes in which organs are labelled in full, for `limner scribbles segment --model`.

    What the model knows of other volumes makes fewer strokes do on a new one. Pixels of all volumes must be of nearly
    one size, and all grey or all RGB.
    """

    images: Annotated[tuple[Path, ...], arg(metavar="IMAGES [IMAGES ...]", help_behavior_hint="(required)")]
    """The volumes, each as `limner scribbles segment` takes it."""
    labels: Annotated[tuple[Path, ...], arg(metavar="LABELS [LABELS ...]", help_behavior_hint="(required)")]
    """Their labels in the same order: of the same shape, every section labelled, 0 background."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="MODEL", help_behavior_hint="(required)")]
    """The model to write, one file that ends in .safetensors."""
    organs: Annotated[Organs, arg(help_behavior_hint="(default: every label that occurs)")] = ()
    """Labels to learn as organs 1, 2, ... in this order; all others are background."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Names of the labels: ITK-SNAP, FreeSurfer or CSV (index,name,r,g,b)."""
    spacing: Annotated[Spacing, arg(help_behavior_hint="(default: from IMAGES)")] = ()
    """Distance between sections, then pixels along y and x, in mm, of every volume."""
    section_axis: SectionAxis = "z"
    """Axis of the volumes along which sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace MODEL where it exists."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Train and write the model.

        Raises
        ------
        ValueError
            If an input or an option is at fault; nothing is written then.
        """
        del command_line
        check_options(self)
        device = find_device(self.device)
        given = read_inputs(self)
        about = describe(given, self.settings, device)
        started, began = utc_now(), time.monotonic()
        try:
            with progress_on(sys.stderr) as report:
                model, losses = fit(given.volumes, self.settings, device.split()[0], report)
        except KeyboardInterrupt:
            print("\nStopped; no model was written.", file=sys.stderr)
            return 130
        course = {"started": started, "ended": utc_now(), "seconds": {"training": round(time.monotonic() - began, 1)}}
        record = {**about, **_origin(self, given, device), **course, "losses": thinned(losses)}
        self._write(dataclasses.replace(model, names=given.names), record)
        print(f"loss: {losses[0]:.4f} at first, {thinned(losses)[-1]:.4f} in the end")
        print(f"Model: {self.output}")
        print(f"Next: limner scribbles segment IMAGES SCRIBBLES --model {self.output} -o OUT")
        return 0

    def _write(self, model: Model, record: Mapping[str, Any]) -> None:
        self.output.parent.mkdir(parents=True, exist_ok=True)
        to_model(model, to_plain(record)).write(self.output)


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked.

    Parameters
    ----------
    volumes : tuple of LabelledVolume
        Labels are 0 for background and 1, 2, ... for the organs.
    organs : tuple of int
        The organs' labels as they are in the files.
    names : tuple of str
        The organs' names.
    """

    volumes: tuple[LabelledVolume, ...]
    organs: tuple[int, ...]
    names: tuple[str, ...]


def check_options(command: ScribblesFit) -> None:
    """Raise ValueError for an option that cannot be, before anything is read."""
    command.settings.check()
    check_model_path(command.output, command.overwrite)
    n_images, n_labels = len(command.images), len(command.labels)
    if n_images == 0:
        raise ValueError("--images: no volume is named; give one at least, and its labels with --labels")
    if n_images != n_labels:
        raise ValueError(
            f"--labels: {n_labels} are given for {n_images} of --images; give labels for each, in one order"
        )


def read_inputs(command: ScribblesFit) -> Inputs:
    """Read and check every volume and its labels.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    names = {} if command.label_table is None else read_table(command.label_table)[0]
    images = [_image(command, path) for path in command.images]
    _check_pixel_sizes(command.images, images)
    maps = [_labels(path, volume, bool(command.organs)) for path, volume in zip(command.labels, images, strict=True)]
    present = sorted({int(label) for one in maps for label in np.unique(one.labels)} - {0})
    organs = command.organs or tuple(present)
    absent = [organ for organ in organs if organ not in present]
    if absent:
        raise ValueError(
            f"--organs: no volume holds label {absent[0]}; `limner info --labels FILE` lists what is there"
        )
    if not organs:
        raise ValueError(f"--labels: {command.labels[0]} and all others hold background alone; give labelled organs")
    volumes = (LabelledVolume(i, renumbered(one.labels, organs)) for i, one in zip(images, maps, strict=True))
    named = tuple(names[organ].name if organ in names else f"label {organ}" for organ in organs)
    return Inputs(tuple(volumes), organs, named)


def renumbered(labels: NDArray[np.integer[Any]], organs: Sequence[int]) -> NDArray[np.integer[Any]]:
    """Labels in which the organs are 1, 2, ... in the order given, and all else is 0.

    Examples
    --------
    >>> renumbered(np.array([0, 3, 12, 7]), (12, 3))
    array([0, 2, 1, 0], dtype=uint8)
    """
    new = np.zeros(labels.shape, np.min_scalar_type(len(organs)))
    for number, organ in enumerate(organs, start=1):
        new[labels == organ] = number
    return new


def _image(command: ScribblesFit, path: Path) -> Volume:
    return read(path, spacing=command.spacing or None, section_axis=command.section_axis)


def _labels(path: Path, images: Volume, chosen: bool) -> LabelMap:
    label_map = read_label_volume(path, images)
    n = np.count_nonzero(np.unique(label_map.labels))
    if n > MOST_ORGANS and not chosen:
        raise ValueError(
            f"--labels: {path} holds {n} labels; name those to learn with --organs (or is it an image? these go to "
            "--images)"
        )
    _check_every_section(path, label_map)
    return label_map


def _check_every_section(path: Path, label_map: LabelMap) -> None:
    """Strokes are on few of the sections that show an organ."""
    labelled = np.flatnonzero(label_map.labels.any(axis=(1, 2)))
    span = labelled[-1] + 1 - labelled[0] if labelled.size else 0
    if 0 < 2 * len(labelled) <= span:
        raise ValueError(
            f"--labels: {path} holds labels on {len(labelled)} of the {span} sections from {labelled[0]} to "
            f"{labelled[-1]}; label every section in full (strokes go to `scribbles segment`)"
        )


def _check_pixel_sizes(paths: Sequence[Path], images: Sequence[Volume]) -> None:
    sizes = [1000 * math.sqrt(volume.space.spacing[1] * volume.space.spacing[2]) for volume in images]
    finest, coarsest = int(np.argmin(sizes)), int(np.argmax(sizes))
    if sizes[coarsest] > UNLIKE * sizes[finest]:
        raise ValueError(
            f"--images: pixels measure {sizes[finest]:.4g} um in {paths[finest]} and {sizes[coarsest]:.4g} um in "
            f"{paths[coarsest]}; resample them to one size"
        )
    if len({volume.pixels.ndim for volume in images}) > 1:
        raise ValueError("--images: some volumes are grey and some RGB; give volumes of one kind")


def describe(given: Inputs, settings: Settings, device: str) -> dict[str, Any]:
    """Print what is trained on and with what; returns the facts for the record."""
    sections = sum(volume.images.space.shape[0] for volume in given.volumes)
    organs = dict(zip(map(str, given.organs), given.names, strict=True))
    print(f"volumes: {len(given.volumes)} with {sections} sections")
    print("organs: " + ", ".join(f"{name} ({label})" for label, name in organs.items()))
    print(f"network: {settings.steps} steps on {device}", flush=True)
    return {"volumes": len(given.volumes), "sections": sections, "organs": organs}


def _origin(command: ScribblesFit, given: Inputs, device: str) -> dict[str, object]:
    """What the model came from, for its record."""
    return {
        "inputs": {"images": _hashes(command.images), "labels": _hashes(command.labels)},
        "image_spacing_mm": [list(volume.images.space.spacing) for volume in given.volumes],
        "seed": command.settings.seed,
        "versions": package_versions(),
        "device": device,
    }


def _hashes(paths: Sequence[Path]) -> dict[str, str]:
    """SHA-256 of each volume by its name, which gets a number where others have it too."""
    names = [path.name for path in paths]
    hashes = {}
    for number, path in enumerate(paths, start=1):
        files = hash_stack(path)
        name = path.name if names.count(path.name) == 1 else f"{path.name} ({number})"
        hashes[name] = content_key(files) if len(files) > 1 else next(iter(files.values()))
    return hashes
