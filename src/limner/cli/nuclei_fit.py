"""``limner nuclei fit``: check everything, train or go on training, score, write the model."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.checkpoint import Checkpoint
from limner.cli.device import find_device
from limner.cli.image_files import hash_image
from limner.cli.model_output import announce, check_model_path, thinned
from limner.cli.progress import Report, progress_on
from limner.io.annotated_images import LARGEST_UM2, MOST_REGIONS, AnnotatedImage, open_annotated, pair_annotations
from limner.methods.partial_nuclei import (
    TASK,
    AnnotatedTile,
    Settings,
    build,
    choose_patches,
    find_nuclei,
    fit,
    to_model,
)
from limner.metrics.objects import ObjectSummary, score_objects, summarise
from limner.model_file import ModelFile, read_model
from limner.networks.tiled_unet import TiledUNet
from limner.run_record import content_key, hash_file, package_versions, to_plain, utc_now

NONE = "(default: none)"
ALGORITHM = 1  # raised with every change that alters training: one that was stopped before it then starts anew
MOST_REGIONS_IN_ALL = 256  # of all images: with the weights of training two gigabytes
LARGEST_VALIDATION = 2**25  # pixels: it is scored in memory


@dataclass(frozen=True)
class NucleiFit:
    """Train a model to find all nuclei on images of which some are outlined.

    What is not outlined counts as unknown, not as background, save near an outlined nucleus and where the stain says
    so. A training that was stopped goes on where it stopped when the same command is given again.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """An image or a slide, or a folder of these: SVS, NDPI, OME-TIFF or another TIFF, OME-Zarr, PNG, JPEG. Images
    without annotation are left out."""
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Its outlined nuclei: GeoJSON from QuPath, or a label image (PNG, TIFF) of the same size in which each nucleus has
    a number and 0 is not annotated; or a folder of these, each named as its image. In GeoJSON, classes that end in *
    (Ignore*), outlines above 2500 um2 and what Limner found are passed over."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="MODEL", help_behavior_hint="(required)")]
    """The model to write, one file that ends in .safetensors."""
    validation: Annotated[tuple[Path, Path] | None, arg(metavar="IMAGES LABELS", help_behavior_hint=NONE)] = None
    """Other images, and labels of ALL their nuclei: the model is scored on them, never made from them."""
    start: Annotated[Path | None, arg(name="from", metavar="MODEL", help_behavior_hint=NONE)] = None
    """Start from this model instead of from scratch; width and pixel size must be the same."""
    um_per_px: Annotated[float | None, arg(metavar="UM", help_behavior_hint="(default: from IMAGES)")] = None
    """Size of the images' pixels in micrometres, for all images; goes before what the files state."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace MODEL where it exists."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Train, score and write the model.

        Raises
        ------
        ValueError
            If an input or an option is at fault; nothing is written then.
        """
        del command_line
        check_options(self)
        given = read_inputs(self)
        checkpoint = Checkpoint(self.output.with_name(f".{self.output.name}.partial"), given.key)
        try:
            with progress_on(sys.stderr) as report:
                self._train_and_write(given, checkpoint, report)
        except KeyboardInterrupt:
            kept = f"; the same command goes on from step {checkpoint.steps}" if checkpoint.steps else ""
            print(f"\nStopped{kept}.", file=sys.stderr)
            return 130
        checkpoint.remove()
        print(f"Model: {self.output}")
        print(f"Next: limner nuclei segment IMAGES {self.output} -o OUT --geojson")
        return 0

    def _train_and_write(self, given: Inputs, checkpoint: Checkpoint, report: Report) -> None:
        started, began = utc_now(), time.monotonic()
        tiles, areas = read_tiles(given.images, self.settings, report)
        facts = {**describe_tiles(tiles, given, self.settings), "median_area_um2": float(np.median(areas))}
        done = announce(checkpoint)
        self.output.parent.mkdir(parents=True, exist_ok=True)

        def tell(step: int, steps: int) -> None:
            report("training", step - done, steps - done)

        with checkpoint.stop_after_step():
            network, losses = fit(tiles, self.settings, given.start, given.device.split()[0], tell, checkpoint)
        trained = time.monotonic()
        scores = score(network, given, self.settings, report)
        seconds = {"training": round(trained - began, 1), "validation": round(time.monotonic() - trained, 1)}
        course = {"started": started, "ended": utc_now(), "seconds": seconds, "resumed_at_step": done}
        results = {"losses": thinned(losses), "validation": scores.to_json() if scores else None}
        record = {**facts, **self._origin(given), **course, **results}
        to_model(network, self.settings, to_plain(record)).write(self.output)
        print_result(losses, scores)

    def _origin(self, given: Inputs) -> dict[str, object]:
        """What the model came from, for its record."""
        return {
            "inputs": given.hashes,
            "image_um_per_px": self.um_per_px,
            "seed": self.settings.seed,
            "versions": package_versions(),
            "device": given.device,
        }


@dataclass(frozen=True)
class Inputs:
    """What the user gave, found and checked; no pixel is read yet.

    Parameters
    ----------
    images, validation : list of AnnotatedImage
        To train on, and to score on.
    without : int
        Images without annotation.
    start : ModelFile or None
        The model to start from.
    hashes : mapping of str to mapping of str to str
        SHA-256 of every file, by argument and name.
    key : str
        Hash of all that the training depends on.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    """

    images: list[AnnotatedImage]
    validation: list[AnnotatedImage]
    without: int
    start: ModelFile | None
    hashes: Mapping[str, Mapping[str, str]]
    key: str
    device: str


def check_options(command: NucleiFit) -> None:
    """Raise ValueError for an option that cannot be, before anything is read."""
    command.settings.check()
    check_model_path(command.output, command.overwrite)
    size = command.um_per_px
    if size is not None and not 0 < size < math.inf:
        raise ValueError(f"--um-per-px: {size} is no pixel size; give micrometres above 0")


def read_inputs(command: NucleiFit) -> Inputs:
    """Find and open every input.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    device = find_device(command.device)
    start = None if command.start is None else read_start(command.start, command.settings)
    pairs, without = pair_annotations(command.images, command.labels)
    images = [_opened(command, pair) for pair in pairs]
    if not any(image.nuclei for image in images):
        raise ValueError(f"LABELS: {command.labels} holds no nucleus; outline some, on one image at least")
    scored = pair_annotations(*command.validation)[0] if command.validation else []
    hashes = {
        "images": {image.name: hash_image(image) for image, _ in pairs},
        "labels": {labels.name: hash_image(labels) for _, labels in pairs},
        "validation_images": {image.name: hash_image(image) for image, _ in scored},
        "validation_labels": {labels.name: hash_image(labels) for _, labels in scored},
        "start": {} if command.start is None else {command.start.name: hash_file(command.start)},
    }
    _check_apart(hashes)
    trained_on = [hashes[name] for name in ("images", "labels", "start")]
    key = content_key(ALGORITHM, asdict(command.settings), trained_on, command.um_per_px)
    validation = [_opened(command, pair) for pair in scored]
    for image in validation:
        if image.level.shape[0] * image.level.shape[1] > LARGEST_VALIDATION:
            raise ValueError(
                f"--validation: {image.path} has {image.level.shape[:2]} pixels at {command.settings.um_per_px:g} um; "
                "give tiles cut from it, it is scored in memory"
            )
    return Inputs(images, validation, len(without), start, hashes, key, device)


def read_start(path: Path, settings: Settings) -> ModelFile:
    """The model to start from.

    Raises
    ------
    ValueError
        If it is no model for nuclei, or its width or pixel size is another; says which option to give.
    """
    model = read_model(path, TASK)
    for name, option in (("width", "--width"), ("um_per_px", "--network-um-per-px")):
        found, wanted = model.settings.get(name), getattr(settings, name)
        if found != wanted:
            raise ValueError(f"--from: {path} has {option[2:]} {found}, the new model {wanted}; give {option} {found}")
    return model


def _opened(command: NucleiFit, pair: tuple[Path, Path]) -> AnnotatedImage:
    return open_annotated(*pair, command.settings.um_per_px, command.um_per_px)


def _check_apart(hashes: Mapping[str, Mapping[str, str]]) -> None:
    trained_on = set(hashes["images"].values())
    both = [name for name, sha in hashes["validation_images"].items() if sha in trained_on]
    if both:
        raise ValueError(f"--validation: {both[0]} is trained on too, so its score would flatter; give other images")


def read_tiles(
    images: Sequence[AnnotatedImage], settings: Settings, report: Report
) -> tuple[list[AnnotatedTile], list[float]]:
    """Regions around the annotated nuclei of every image, with the weight of their background; areas of nuclei, um2."""
    annotated = [image for image in images if image.nuclei]
    most = max(1, min(MOST_REGIONS, MOST_REGIONS_IN_ALL // len(annotated)))
    regions = [(image, region) for image in annotated for region in image.regions(most)]
    tiles, areas = [], []
    for done, (image, region) in enumerate(regions, start=1):
        pixels, labels = image.read(region)
        tiles.append(AnnotatedTile.from_labels(pixels, labels, settings))
        areas += (np.unique(labels[labels > 0], return_counts=True)[1] * settings.um_per_px**2).tolist()
        report("annotations", done, len(regions))
    return tiles, areas


def describe_tiles(tiles: Sequence[AnnotatedTile], given: Inputs, settings: Settings) -> dict[str, int]:
    """Print what is trained on and with what; returns the numbers for the record."""
    facts = {
        "images": len(given.images),
        "nuclei": sum(image.nuclei for image in given.images),
        "regions": len(tiles),
        "patches": sum(len(choose_patches(tile, settings)) for tile in tiles),
        "parameters": sum(p.numel() for p in build(settings).parameters()),
    }
    size = f"{settings.patch} pixels at {settings.um_per_px:g} um"
    passed_over = sum(image.passed_over for image in given.images)
    left_out = f"; {given.without} without annotation left out" if given.without else ""
    no_nuclei = f"; {passed_over} outlines passed over (class with *, above {LARGEST_UM2:g} um2, or found by Limner)"
    print(f"images: {facts['images']} annotated{left_out}")
    print(f"nuclei annotated: {facts['nuclei']}{no_nuclei if passed_over else ''}")
    print(f"patches: {facts['patches']} of {size}, from {len(tiles)} regions")
    print(f"network: {facts['parameters']} parameters, {settings.steps} steps on {given.device}", flush=True)
    return facts


def score(network: TiledUNet, given: Inputs, settings: Settings, report: Report) -> ObjectSummary | None:
    """Scores on the validation images, at the network's pixel size; None where there are none."""
    scores = []
    device: Literal["cpu", "cuda"] = "cuda" if given.device.startswith("cuda") else "cpu"
    for done, image in enumerate(given.validation, start=1):
        found = find_nuclei(network, image.level, settings.um_per_px, device=device)
        scores.append(score_objects(found, image.labels_of(image.whole)))
        report("validation", done, len(given.validation))
    return summarise(scores) if scores else None


def print_result(losses: Sequence[float], scores: ObjectSummary | None) -> None:
    """Print the loss, and the scores where there are any."""
    first, *_, last = thinned([losses[0], *losses])
    print(f"loss: {first:.4f} at first, {last:.4f} in the end")
    if scores is not None:
        names = {"aji": "AJI", "pq": "PQ", "f1": "F1 of nuclei", "pixel_f1": "F1 of pixels"}
        values = ", ".join(f"{title} {scores.mean[name]:.3f}" for name, title in names.items())
        print(f"validation, mean of {scores.pooled.images} images: {values}")
