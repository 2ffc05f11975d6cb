"""``limner nuclei segment``: check the batch, find the nuclei of one image after the other, resume."""

from __future__ import annotations

import dataclasses
import sys
import time
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.cli.cluster import check_scheduler
from limner.cli.device import find_device
from limner.cli.image_files import hash_image, list_images, result_names
from limner.cli.nuclei_report import report_of
from limner.cli.nuclei_results import Finder, Found, Wanted, search, window_options, write_image
from limner.cli.progress import progress_on
from limner.cli.run_folder import RunFolder
from limner.io.slide import open_slide
from limner.methods.partial_nuclei import TASK, Separation, from_model
from limner.model_file import read_model
from limner.parallel import keep_freed_memory
from limner.report.nuclei import NucleiReport, write_nuclei_report
from limner.run_record import RunRecord, content_key, differing_settings, hash_file

REPORT = "report.html"
UNLIKE = 2.0  # times the area of the nuclei trained on
FOLDERS = ("labels", "objects", "probabilities")
ALGORITHM = 1  # raised whenever the same settings give other nuclei


@dataclass(frozen=True)
class NucleiSegment:
    """Find all nuclei on images or whole slides with a trained model.

    Writes into OUT, for each image NAME: labels/NAME.png (.tif beyond 65535 nuclei; labels/NAME.ome.zarr, at the
    model's pixel size, for a slide: several levels or above 33 million pixels), objects/NAME.csv with the place, size
    and stain of each nucleus, and what else is asked for; report.html and run.json. Given again, the same command
    passes over images that are done and goes on within a slide. An image that cannot be read is named, the others are
    done, and the exit status is 3.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """An image (PNG, JPEG, TIFF, OME-TIFF, OME-Zarr), a slide (SVS, NDPI, pyramids), or a folder of them."""
    model: Annotated[Positional[Path], arg(metavar="MODEL")]
    """A model that `limner nuclei fit` wrote."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be."""
    um_per_px: Annotated[float | None, arg(metavar="UM", help_behavior_hint="(default: from the files)")] = None
    """Pixel size of the images in micrometres; goes before what the files state."""
    geojson: FlagCreatePairsOff[bool] = False
    """Also write objects/NAME.geojson, which QuPath opens."""
    geojson_gz: FlagCreatePairsOff[bool] = False
    """Also write objects/NAME.geojson.gz, the same compressed."""
    table: Literal["csv", "parquet"] = "csv"
    """Format of the table of nuclei."""
    probabilities: FlagCreatePairsOff[bool] = False
    """Also write probabilities/NAME.tif (float32, in steps of 1/255), or NAME.ome.zarr (0 to 255) for a slide."""
    ngff_version: Literal["0.5", "0.4"] = "0.5"
    """Version of OME-Zarr."""
    separation: Separation = field(default_factory=Separation)
    """How the probability becomes nuclei."""
    tissue: bool = True
    """Tell tissue from glass: slides are not searched there, and nuclei per mm2 are those of tissue."""
    tile: int = 1536
    """Side of the windows in pixels; it bounds the memory. What the network says does not depend on it, nor do nuclei
    but in clumps longer than 15 um, which may be split otherwise where windows meet."""
    windows: Literal["exact", "paper"] = "exact"
    """'exact': the same result as the whole image at once; 'paper': windows of 256 every 128, for comparison."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    batch: int = 1
    """Windows computed at once; more than 1 may pay on a GPU."""
    jobs: int = 1
    """Windows side by side: one may be read or separated while another is computed."""
    scheduler: Annotated[str | None, arg(metavar="ADDRESS", help_behavior_hint="(default: threads here)")] = None
    """Address of a dask.distributed cluster whose workers compute the windows."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from another model or settings, or were changed by hand."""

    def run(self, command_line: Sequence[str]) -> int:
        """Segment every image that is not done yet.

        Returns
        -------
        int
            0; 2 where nothing could be segmented, 3 where some images could not, 130 when stopped.

        Raises
        ------
        ValueError
            If an input or option is at fault or OUT cannot be used; nothing is written then.
        """
        keep_freed_memory()
        folder = RunFolder(self.output)
        folder.check_apart_from({"IMAGES": self.images, "MODEL": self.model})
        batch = check_batch(self)
        record = new_record(self, batch, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        record = _with_images_of(record, earlier)
        if not self.overwrite:
            _check_same_images(folder, record, batch)
        running = folder.begin(record, earlier)
        done = finished_images(running, earlier)
        try:
            found, running = _segment_all(batch, folder, running, done)
            return _finish(batch, folder, running, found)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from the last finished image or window.", file=sys.stderr)
            return 130


@dataclass(frozen=True)
class Batch:
    """What the user gave, checked.

    Parameters
    ----------
    finder : Finder
        The network and how it is used.
    wanted : Wanted
        Which files each image leaves.
    images : mapping of str to Path
        Images by the name of their results.
    um_per_px : float or None
        Their pixel size, where the user gave it.
    problems : mapping of str to str
        Why some of them cannot be read.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    trained_area_um2 : float or None
        Median area of the nuclei that the model was trained on.
    """

    finder: Finder
    wanted: Wanted
    images: Mapping[str, Path]
    um_per_px: float | None
    problems: Mapping[str, str]
    device: str
    trained_area_um2: float | None


def check_batch(command: NucleiSegment) -> Batch:
    """Read the model and open every image; nothing is computed or written.

    Raises
    ------
    ValueError
        The first fault found, in one line. An image that cannot be read is none, unless there is no other.
    """
    _check_options(command)
    if command.scheduler is None:
        device = find_device(command.device)
    else:
        device = command.device  # of the workers, which choose for themselves
        check_scheduler(command.scheduler)
    model = read_model(command.model, TASK)
    network, settings = from_model(model)
    compute = {"batch": command.batch, "jobs": command.jobs, "device": device.split()[0]}
    options = window_options(command.windows, command.tile, settings.um_per_px, scheduler=command.scheduler, **compute)
    try:
        options.grid(network, (1, 1))
    except ValueError as error:
        raise ValueError(f"--tile: {str(error).removeprefix('TileGrid(): ')}") from None
    finder = Finder(network, settings.um_per_px, command.separation, options, command.tissue)
    geojson = (*((".geojson",) if command.geojson else ()), *((".geojson.gz",) if command.geojson_gz else ()))
    wanted = Wanted(command.table, geojson, command.probabilities, command.ngff_version)
    images = result_names(list_images(command.images))
    problems = _problems(images, command.um_per_px)
    trained_area = model.record.get("median_area_um2")
    return Batch(finder, wanted, images, command.um_per_px, problems, device, trained_area)


def _check_options(command: NucleiSegment) -> None:
    if command.um_per_px is not None and not 0 < command.um_per_px < float("inf"):
        raise ValueError(f"--um-per-px: {command.um_per_px} is no pixel size; give micrometres above 0")
    for name in ("batch", "jobs"):
        if getattr(command, name) < 1:
            raise ValueError(f"--{name}: {getattr(command, name)} is below 1; give 1 or more")
    separation = command.separation
    if not 0 < separation.neck_um < float("inf"):
        raise ValueError(f"--neck-um: {separation.neck_um} is no depth; give micrometres above 0")
    if not 0 < separation.threshold < 1:
        raise ValueError(f"--threshold: {separation.threshold} is no probability; give one above 0 and below 1")
    for name in ("smooth_um", "least_um2", "hole_um2"):
        if not 0 <= getattr(separation, name) < float("inf"):
            option = name.replace("_", "-")
            raise ValueError(f"--{option}: {getattr(separation, name)} is out of range; give 0 or more")
    if command.table == "parquet" and find_spec("pyarrow") is None:
        raise ValueError("--table: pyarrow is not installed; pip install limner[parquet], or leave it out")


def _problems(images: Mapping[str, Path], um_per_px: float | None) -> dict[str, str]:
    """Why images cannot be read, by name."""
    problems = {}
    for name, path in images.items():
        try:
            slide = open_slide(path, um_per_px)
        except ValueError as error:
            problems[name] = _plain(error)
            continue
        if slide.um_per_px is None:
            raise ValueError(
                f"--um-per-px: {path} does not state its pixel size; give it in micrometres (it holds for all images: "
                "put those that state their own into another folder)"
            )
    if len(problems) == len(images):
        raise ValueError(next(iter(problems.values())))
    return problems


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())


def new_record(command: NucleiSegment, batch: Batch, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its results depend on, and what else was asked for."""
    model = hash_file(command.model)
    settings = {
        **dataclasses.asdict(command.separation),
        "algorithm": ALGORITHM,
        "model": model,
        "um_per_px": command.um_per_px,
        "windows": command.windows,
        "tissue": command.tissue,
    }
    return RunRecord(
        command=tuple(command_line),
        settings=settings,
        inputs={"model": {command.model.name: model}},
        options={**dataclasses.asdict(batch.wanted), "tile": command.tile},
        device=batch.device,
        seed=0,
    )


def _with_images_of(record: RunRecord, earlier: RunRecord | None) -> RunRecord:
    """With what an earlier run of the same settings found."""
    if earlier is None or differing_settings(earlier, record):
        return record
    return dataclasses.replace(record, images=earlier.images)


def _check_same_images(folder: RunFolder, record: RunRecord, batch: Batch) -> None:
    """Refuse to replace what was found in one image by what is found in another of the same name."""
    for name, path in batch.images.items():
        entry = record.images.get(name, {})
        if entry.get("path", str(path.resolve())) != str(path.resolve()) and entry["sha"] != hash_image(path):
            raise ValueError(
                f"--output: {folder.path} holds results of another image called {name}, {entry['path']}; name another "
                "folder, or add --overwrite to replace them"
            )


def finished_images(running: RunRecord, earlier: RunRecord | None) -> dict[str, tuple[str, Found]]:
    """Images whose results are all there as they were written: by name their key and what was found."""
    done = {}
    for name, entry in running.images.items():
        if earlier is None or "key" not in entry:
            continue
        files = list(_files_of(entry, earlier.outputs))
        if files and all(running.outputs.get(file) == earlier.outputs[file] for file in files):
            done[name] = entry["key"], Found.from_entry(entry)
    return done


def _files_of(entry: Mapping[str, Any], outputs: Mapping[str, str]) -> Iterator[str]:
    """The files of an image among all: its own and those within its OME-Zarr folders."""
    places = tuple(entry.get("files", ()))
    folders = tuple(f"{place}/" for place in places)
    return (file for file in outputs if file in places or (folders and file.startswith(folders)))


def _segment_all(
    batch: Batch, folder: RunFolder, running: RunRecord, done: Mapping[str, tuple[str, Found]]
) -> tuple[dict[str, Found | str], RunRecord]:
    """One image after the other; gives what was found in each, or why nothing, and the record of it."""
    found: dict[str, Found | str] = {}
    for number, (name, path) in enumerate(batch.images.items(), 1):
        try:
            if name in batch.problems:
                raise ValueError(batch.problems[name])
            sha = hash_image(path)
            if name in done and done[name][0] == _key(running, batch, sha):
                result = done[name][1]
                running = _noted(folder, running, name, _without_problem(running.images[name]))
            else:
                print(f"{path.name} ({number} of {len(batch.images)})", file=sys.stderr, flush=True)
                result, running = _segment_one(batch, folder, running, name, sha)
            found[name] = result
            print(result.in_words(name), flush=True)
            _warn_of_sizes(name, result.median_area_um2, batch.trained_area_um2)
        except ValueError as error:
            found[name] = _plain(error)
            running = _noted(folder, running, name, {**running.images.get(name, {}), "problem": _plain(error)})
            print(f"limner: error: {_plain(error)}", file=sys.stderr, flush=True)
    return found, running


def _warn_of_sizes(name: str, found_um2: float | None, trained_um2: float | None) -> None:
    if found_um2 and trained_um2 and not 1 / UNLIKE < found_um2 / trained_um2 < UNLIKE:
        warnings.warn(
            f"{name}: the nuclei found have {found_um2:.1f} um2 in the median, those that the model was trained on "
            f"{trained_um2:.1f}; check the pixel size, and the outlines in the report",
            stacklevel=2,
        )


def _key(running: RunRecord, batch: Batch, sha: str) -> str:
    """What the files of an image depend on; its tiles do not depend on which files are wanted."""
    return content_key(running.settings, batch.wanted, sha)


def _segment_one(batch: Batch, folder: RunFolder, running: RunRecord, name: str, sha: str) -> tuple[Found, RunRecord]:
    """Find the nuclei of an image, put its files in place, and note that it is done."""
    began = time.monotonic()
    slide = open_slide(batch.images[name], batch.um_per_px)
    results: list[Found] = []
    with progress_on(sys.stderr) as report:
        tiles = folder.path / ".resume" / "tiles" / name
        searched = search(slide, batch.finder, tiles, content_key(running.settings, sha), report)

        def write(staging: Path) -> None:
            results.append(write_image(staging, name, searched, batch.wanted, report))

        running = folder.put(running, write, _results_of(name, running.outputs))
    path = str(slide.path.resolve())
    entry = {"key": _key(running, batch, sha), "path": path, "sha": sha, **dataclasses.asdict(results[0])}
    return results[0], _noted(folder, running, name, {**entry, "seconds": round(time.monotonic() - began, 2)})


def _without_problem(entry: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in entry.items() if key != "problem"}


def _results_of(name: str, outputs: Iterable[str]) -> list[str]:
    """All files that an image of this name left, by this run or an earlier one of other settings."""
    endings = (".png", ".tif", ".csv", ".parquet", ".geojson", ".geojson.gz")
    files = {f"{folder}/{name}{ending}" for folder in FOLDERS for ending in endings}
    within = tuple(f"{folder}/{name}.ome.zarr/" for folder in FOLDERS)
    return [file for file in outputs if file in files or file.startswith(within)]


def _noted(folder: RunFolder, running: RunRecord, name: str, entry: Mapping[str, Any]) -> RunRecord:
    """The record with what came of an image, written."""
    running = dataclasses.replace(running, images={**running.images, name: entry})
    folder.note(running)
    return running


def _finish(batch: Batch, folder: RunFolder, running: RunRecord, found: Mapping[str, Found | str]) -> int:
    """Write the report, complete the record, say what came out; gives the exit status."""
    problems = [f"{name}: {result}" for name, result in found.items() if isinstance(result, str)]
    results = [result for result in found.values() if isinstance(result, Found)]
    summary = f"{sum(result.count for result in results)} nuclei in {len(results)} of {len(found)} images."
    if problems:
        summary += f" Not done: {', '.join(batch.images[n].name for n, r in found.items() if isinstance(r, str))}."
    own = {REPORT} | {file for entry in running.images.values() for file in _files_of(entry, running.outputs)}
    running = folder.put(running, lambda _: None, set(running.outputs) - own)  # what other settings left
    earlier = {name: entry for name, entry in running.images.items() if name not in found and "files" in entry}

    def write(staging: Path) -> None:
        every = {**found, **{name: Found.from_entry(entry) for name, entry in earlier.items()}}
        images = {**batch.images, **{name: Path(entry["path"]) for name, entry in earlier.items()}}
        reports = report_of(folder.path, every, images, batch.um_per_px)
        report = NucleiReport(folder.path.resolve().name, reports, settings_shown(running), tuple(problems))
        write_nuclei_report(staging / REPORT, report)

    running = folder.put(running, write, {REPORT} & set(running.outputs))
    done = running.completed(summary=summary, notes=tuple(problems))
    folder.note(dataclasses.replace(done, replaceable={}))
    print(summary)
    print(f"Report: {folder.path / REPORT}", file=sys.stderr)
    return 0 if not problems else 3 if results else 2


def settings_shown(record: RunRecord) -> dict[str, object]:
    """Settings for the report: the model by its name, the pixel size in words."""
    shown = {**record.settings, "model": ", ".join(record.inputs["model"])}
    return {**shown, "um_per_px": record.settings["um_per_px"] or "as the files state"}
