"""``limner prior fit``: check everything, align the label maps, learn the prior or go on learning, write it."""

from __future__ import annotations

import shutil
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.checkpoint import Checkpoint
from limner.cli.device import find_device
from limner.cli.model_output import announce, check_model_path, thinned
from limner.cli.progress import Report, progress_on
from limner.cli.volume_files import equal_neighbours, hash_volume, list_volumes, read_scan
from limner.io import default_colour, read_label_volume, read_table
from limner.label_map_prior import BrainMap, Settings, build, fit
from limner.label_merging import Merging, each_label, merge_sides, read_merging
from limner.methods.anatomical_prior import to_model
from limner.registration.template import Template, make_template, paint
from limner.registration.volume_affine import align_labels
from limner.registration.volume_transform import covered, resample
from limner.run_record import Store, content_key, hash_file, package_versions, stored, to_plain, utc_now
from limner.volume import LabelMap, LabelTable, Volume

NONE = "(default: none)"
ALGORITHM = 2  # raised with every change that alters alignment or training: what was stopped before it starts anew
LEAST_MAPS = 2
LEAST_ALIKE = 0.5  # as of `equal_neighbours`
LEVELS = 4  # intensities of a painted template: with more, a scan shares less of its information


@dataclass(frozen=True)
class PriorFit:
    """Learn from label maps of brains what anatomy looks like, so that scans can be segmented that nobody labelled.

    The label maps may come from any subjects, of another study say; no image is needed. Each is aligned to a template
    first, which takes some ten seconds. One that cannot be aligned is named, the prior is learned from the others, and
    the exit status is 3. A run that was stopped goes on where it stopped when the same command is given again.
    """

    label_maps: Annotated[Positional[Path], arg(metavar="LABELMAPS")]
    """A folder of label maps, one a subject: NIfTI, MGZ, NRRD or MHA volumes in which every voxel has the number of its
    structure and 0 is background; some twenty do."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="PRIOR", help_behavior_hint="(required)")]
    """The prior to write, one file that ends in .safetensors."""
    template: Annotated[Path | None, arg(metavar="IMAGE", help_behavior_hint=NONE)] = None
    """Scan of a brain without skull to align everything to, of any contrast, MNI say; it is kept in PRIOR. Without it
    the label map whose brain is of the median size is painted with made-up intensities; a real image is better."""
    merge: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint=NONE)] = None
    """Which labels make up which structure: CSV with the header structure,labels and rows such as
    thalamus,10,Right-Thalamus or cortex,3,42,1000-2035; the row background takes what is to be left out. Without it
    every label is a structure of its own."""
    merge_sides: FlagCreatePairsOff[bool] = False
    """Left and right are one structure where their names in --label-table differ in the side alone."""
    label_table: Annotated[Path | None, arg(metavar="FILE", help_behavior_hint=NONE)] = None
    """Names and colours of the labels: FreeSurfer, ITK-SNAP or CSV (index,name,r,g,b)."""
    spacing_mm: float = 2.0
    """Spacing of the template's grid in mm, on which the prior lives; 2 for human brains, some 0.15 for mice."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace PRIOR where it exists."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Align, learn and write the prior.

        Returns
        -------
        int
            0; 3 where some label maps could not be aligned, 130 when stopped.

        Raises
        ------
        ValueError
            If an input or an option is at fault, or fewer than two label maps can be aligned; no prior is written then.
        """
        del command_line
        check_options(self)
        checkpoint_path = self.output.with_name(f".{self.output.name}.partial")
        store = Store(self.output.with_name(f".{self.output.name}.aligned"))
        try:
            with progress_on(sys.stderr) as report:
                given = read_inputs(self, report)
                self.output.parent.mkdir(parents=True, exist_ok=True)
                aligned = align_all(given, store, report)
                checkpoint = Checkpoint(checkpoint_path, content_key(given.key, asdict(self.settings)))
                self._fit_and_write(given, aligned, checkpoint, report)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on where it was.", file=sys.stderr)
            return 130
        checkpoint.remove()
        shutil.rmtree(store.folder, ignore_errors=True)
        print(f"Prior: {self.output}")
        print(f"Next: limner prior segment SCANS {self.output} -o OUT")
        return 3 if aligned.failed else 0

    def _fit_and_write(self, given: Inputs, aligned: Aligned, checkpoint: Checkpoint, report: Report) -> None:
        started, began = utc_now(), time.monotonic()
        describe(given, aligned, self.settings)
        done = announce(checkpoint)

        def tell(step: int, steps: int) -> None:
            report("training", step - done, steps - done)

        maps, device = list(aligned.maps.values()), given.device.split()[0]
        with checkpoint.stop_after_step():
            prior, losses = fit(maps, given.template, given.merging, self.settings, device, tell, checkpoint)
        first, *_, last = thinned([losses[0], *losses])
        print(f"loss: {first:.4g} nats a slice at first, {last:.4g} in the end")
        seconds = {"alignment": aligned.seconds, "training": round(time.monotonic() - began, 1)}
        course = {"started": started, "ended": utc_now(), "seconds": seconds, "resumed_at_step": done}
        record = {**facts(given, aligned), **course, "losses": thinned(losses)}
        to_model(prior, to_plain(record)).write(self.output)


@dataclass(frozen=True)
class Inputs:
    """What the user gave, checked.

    Parameters
    ----------
    maps : mapping of str to Path
        Label maps by name.
    merging : Merging
        Structures that occur.
    table : LabelTable
        Names and colours of the structures.
    template : Template
        What is aligned to.
    origin : str
        What the template is.
    hashes : mapping of str to mapping of str to str
        SHA-256 of every file, by argument and name.
    key : str
        Hash of all that the prior depends on but the method's settings.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    """

    maps: Mapping[str, Path]
    merging: Merging
    table: LabelTable
    template: Template
    origin: str
    hashes: Mapping[str, Mapping[str, str]]
    key: str
    device: str


@dataclass(frozen=True)
class Aligned:
    """Label maps on the template's grid.

    Parameters
    ----------
    maps : mapping of str to BrainMap
        By name.
    overlaps : mapping of str to float
        Dice of each one's brain with the template's.
    failed : mapping of str to str
        Why others could not be aligned, by name.
    seconds : float
        That it took.
    """

    maps: Mapping[str, BrainMap]
    overlaps: Mapping[str, float]
    failed: Mapping[str, str]
    seconds: float


def check_options(command: PriorFit) -> None:
    """Raise ValueError for an option that cannot be, before anything is read."""
    command.settings.check()
    check_model_path(command.output, command.overwrite)
    if not 0 < command.spacing_mm < float("inf"):
        raise ValueError(f"--spacing-mm: {command.spacing_mm} is no spacing; give mm above 0")
    if command.merge is not None and command.merge_sides:
        raise ValueError("--merge-sides: --merge says which labels are one structure; leave one of the two out")
    if command.merge_sides and command.label_table is None:
        raise ValueError("--merge-sides: sides are told by the labels' names; give --label-table")


def read_inputs(command: PriorFit, report: Report) -> Inputs:
    """Read and check every input.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    device = find_device(command.device)
    names = {} if command.label_table is None else read_table(command.label_table)[0]
    paths = list_volumes(command.label_maps, "LABELMAPS")
    if len(paths) < LEAST_MAPS:
        raise ValueError(f"LABELMAPS: {command.label_maps} holds one label map; give {LEAST_MAPS} or more, in a folder")
    given = None if command.merge is None else read_merging(command.merge, names)
    sizes = survey(paths, report)
    present = {label for of_map in sizes.values() for label in of_map}
    every = given or (merge_sides if command.merge_sides else each_label)(present, names)
    for name, of_map in sizes.items():
        every.to_classes(np.array(list(of_map)), str(paths[name]))  # raises for labels of no structure
    merging = Merging(tuple(s for s in every.structures if s[0] == every.names[0] or present & {*s[1]}))
    _check_floor(command.settings.floor, len(merging.names))
    brains = {
        name: sum(mm3 for n, mm3 in of.items() if n not in merging.structures[0][1]) for name, of in sizes.items()
    }
    empty = next((paths[name] for name, mm3 in brains.items() if not mm3), None)
    if empty is not None:
        raise ValueError(f"LABELMAPS: {empty} shows no structure, only background; take it out")
    if command.template is None:
        median = sorted(brains, key=lambda name: brains[name])[len(brains) // 2]
        template, origin = painted_template(paths[median], merging, command.spacing_mm), f"painted from {median}"
    else:
        template, origin = on_grid(read_scan(command.template), command.spacing_mm), command.template.name
    hashes = {"label_maps": {path.name: hash_volume(path) for path in paths.values()}}
    for what, path in {"template": command.template, "merge": command.merge}.items():
        hashes[what] = {} if path is None else {path.name: hash_file(path)}
    key = content_key(ALGORITHM, hashes["label_maps"], merging, template.pixels, template.space)
    return Inputs(paths, merging, coloured(merging.table(names)), template, origin, hashes, key, device)


def _check_floor(floor: float, n_labels: int) -> None:
    """The least frequencies of all labels, background among them, must leave room."""
    if floor * n_labels >= 1:
        raise ValueError(
            f"--floor: {floor} of each of {n_labels} labels, background too; give less than 1 / {n_labels}"
        )


def survey(paths: Mapping[str, Path], report: Report) -> dict[str, dict[int, float]]:
    """Volume of every label of every label map, mm3, by name and label.

    Raises
    ------
    ValueError
        If one of them is no label map but an image.
    """
    sizes: dict[str, dict[int, float]] = {}
    for done, (name, path) in enumerate(paths.items(), start=1):
        label_map = read_label_volume(path)
        _check_labels(label_map, path)
        labels, counts = np.unique(label_map.labels, return_counts=True)
        voxel = float(np.prod(label_map.space.spacing))
        sizes[name] = {int(n): float(count) * voxel for n, count in zip(labels, counts, strict=True)}
        report("label maps", done, len(paths))
    return sizes


def _check_labels(label_map: LabelMap, path: Path) -> None:
    """Neighbours in a structure have one number; in an image hardly any two are equal."""
    alike = equal_neighbours(label_map.labels)
    if alike < LEAST_ALIKE:
        raise ValueError(
            f"LABELMAPS: {path} looks like an image: {alike:.0%} of neighbouring voxels are equal; give label maps, in "
            "which each structure has one number"
        )


def coloured(table: LabelTable) -> LabelTable:
    """A table in which labels without a colour, black that is, have one of their own."""
    return {n: row if any(row.colour) else type(row)(row.name, default_colour(n)) for n, row in table.items()}


def painted_template(path: Path, merging: Merging, spacing_mm: float) -> Template:
    """A label map as an image: neighbours in the numbering differ in intensity, which suffices to align to."""
    classes = read_classes(path, merging)
    steps = 0.2 + 0.8 * ((np.arange(len(merging.names)) - 1) % LEVELS) / (LEVELS - 1)
    image = Volume(paint(classes, dict(enumerate(steps.tolist()))), classes.space)
    return on_grid(image, spacing_mm, classes.labels > 0)


def on_grid(image: Volume, spacing_mm: float, brain: NDArray[np.bool_] | None = None) -> Template:
    """As of `make_template`; where the spacing is at fault the message names the option."""
    try:
        return make_template(image, spacing_mm, brain)
    except ValueError as error:
        raise ValueError(str(error).replace("make_template(): spacing_mm is", "--spacing-mm:")) from None


def read_classes(path: Path, merging: Merging) -> LabelMap:
    """A label map whose labels are the classes 0, 1, ... of `merging`."""
    label_map = read_label_volume(path)
    return LabelMap(merging.to_classes(label_map.labels, str(path)), label_map.space)


def align_all(given: Inputs, store: Store, report: Report) -> Aligned:
    """Align every label map, but those that `store` has aligned already.

    Raises
    ------
    ValueError
        If fewer than two can be aligned.
    """
    began, total = time.monotonic(), len(given.maps)
    maps: dict[str, BrainMap] = {}
    overlaps: dict[str, float] = {}
    failed: dict[str, str] = {}
    for done, (name, path) in enumerate(given.maps.items(), start=1):
        sha = given.hashes["label_maps"][path.name]
        found = stored(store, sha, content_key(given.key, sha), lambda path=path: align_one(path, given))  # type: ignore[misc]
        if why := str(found["failed"]):
            failed[name] = why
            print(f"limner: error: {path} cannot be aligned: {why}; it is left out", file=sys.stderr, flush=True)
        else:
            maps[name], overlaps[name] = BrainMap(found["classes"], found["known"]), float(found["overlap"])
        report("alignment", done, total)
    if len(maps) < LEAST_MAPS:
        raise ValueError(
            f"LABELMAPS: {len(maps)} of {total} label maps could be aligned to the template ({given.origin}), "
            f"{LEAST_MAPS} at least are needed; look at them beside it, or give another --template"
        )
    return Aligned(maps, overlaps, failed, round(time.monotonic() - began, 1))


def align_one(path: Path, given: Inputs) -> dict[str, NDArray[Any]]:
    """Classes and what is known on the template's grid, overlap, and why it failed, empty where it did not."""
    classes, template = read_classes(path, given.merging), given.template
    alignment = align_labels(classes, template)
    return {
        "classes": resample(classes, template.space, alignment.transform).labels,
        "known": covered(classes.space, template.space, alignment.transform),
        "overlap": np.array(alignment.overlap),
        "failed": np.array(alignment.failed),
    }


def describe(given: Inputs, aligned: Aligned, settings: Settings) -> None:
    """Print what is learned from and with what."""
    names = given.merging.names[1:]
    overlaps = list(aligned.overlaps.values())
    left_out = f", {len(aligned.failed)} left out" if aligned.failed else ""
    overlap = f"overlap of brains {np.mean(overlaps):.2f}, least {min(overlaps):.2f}"
    print(f"label maps: {len(aligned.maps)}{left_out}; {overlap}")
    print(f"structures: {len(names)}: {', '.join(names)}")
    network = build(len(names) + 1, given.template.space.shape, settings)
    parameters = sum(p.numel() for p in network.parameters())
    print(f"template: {given.origin}, {grid_in_words(given.template)}")
    print(f"network: {parameters} parameters, {settings.steps} steps on {given.device}", flush=True)


def grid_in_words(template: Template) -> str:
    """Such as ``96 x 112 x 96 voxels of 2 mm``."""
    return f"{' x '.join(map(str, template.space.shape))} voxels of {template.space.spacing[0]:g} mm"


def facts(given: Inputs, aligned: Aligned) -> dict[str, Any]:
    """What the prior came from, for its record."""
    return {
        "label_maps": list(aligned.maps),
        "left_out": dict(aligned.failed),
        "overlaps": dict(aligned.overlaps),
        "template": given.origin,
        "colours": {str(n): row.colour for n, row in given.table.items()},
        "inputs": given.hashes,
        "versions": package_versions(),
        "device": given.device,
    }
