"""``limner prior segment``: check the batch, align, fit to the scans, segment one after the other, resume."""

from __future__ import annotations

import re
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.aligned_scan import AlignedScan, place
from limner.cli.device import find_device
from limner.cli.model_output import check_model_path, thinned
from limner.cli.prior_results import SUMMARIES, Result, Truth, views_of, write_scan, write_summaries
from limner.cli.progress import progress_on
from limner.cli.run_folder import RunFolder
from limner.cli.volume_files import ENDINGS, brain_of, companions, hash_volume, list_volumes, read_scan
from limner.io import default_colour
from limner.io.tissues import read_shared_tissues
from limner.label_map_prior import Prior
from limner.label_merging import Merging, read_merging
from limner.methods.anatomical_prior import (
    TASK,
    ImageModel,
    Inference,
    fit_encoder,
    from_model,
    segment,
    to_model,
)
from limner.model_file import ModelFile, read_model
from limner.parallel import keep_freed_memory
from limner.registration.volume_affine import Alignment, align
from limner.registration.volume_transform import transform_of
from limner.report.anatomical_prior import PriorReport
from limner.run_record import RunRecord, Store, content_key, differing_settings, hash_file, stored, to_plain, utc_now
from limner.volume import Label, LabelTable

NONE = "(default: none)"
ALGORITHM = 3  # raised whenever the same settings give other results
# settings that what is learned from the scans is free of
OF_RESULTS = ("own_steps", "refine", "location_share", "bias_order", "draws", "samples")


@dataclass(frozen=True)
class PriorSegment:
    """Segment brain scans that nobody labelled, with a prior learned from label maps of other subjects.

    The scans are of one contrast, any, and without skull (or with --masks). Writes into OUT, for each scan NAME, in its
    own format and on its own grid: labels/NAME in the label maps' numbers, uncertainty/NAME (0 to 1), samples/NAME_1,
    ... with --samples, transforms/NAME.json; and structures.csv, volumes.csv, report.html and run.json. Given again,
    the same command goes on where it stopped. A scan that cannot be read or aligned is named, the others are done, and
    the exit status is 3.
    """

    scans: Annotated[Positional[Path], arg(metavar="SCANS")]
    """A scan, or a folder of them: NIfTI, MGZ, NRRD or MHA volumes, grey, of any grid and orientation."""
    prior: Annotated[Positional[Path], arg(metavar="PRIOR")]
    """What `limner prior fit` wrote; or what --save-model wrote, which segments in seconds, for nothing is learned
    anew."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT", help_behavior_hint="(required)")]
    """Folder for the results, made if need be."""
    masks: Annotated[Path | None, arg(metavar="MASKS", help_behavior_hint=NONE)] = None
    """Where the brains are, above 0: a folder of volumes named as the scans, or a file for one scan. Without it a brain
    is what differs from the background, so scans must be without skull."""
    tissues: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint=NONE)] = None
    """CSV (structure,tissue): structures of one tissue are equally bright in the scans. Give at least what holds fluid
    one tissue, background among it, for inside the brain that is fluid as well."""
    save_model: Annotated[Path | None, arg(metavar="MODEL", help_behavior_hint=NONE)] = None
    """Keep what was learned from the scans together with the prior, for other scans of this contrast; a file that ends
    in .safetensors, to be given as PRIOR."""
    truth: Annotated[Path | None, arg(metavar="LABELS", help_behavior_hint=NONE)] = None
    """True label maps named as the scans, to score the result with; nothing is made from them."""
    truth_merge: Annotated[Path | None, arg(metavar="TABLE", help_behavior_hint=NONE)] = None
    """Which labels of --truth make up which structure of the prior, by the names it has there; a table as of
    `limner prior fit --merge`. Without it they are numbered as the prior's label maps."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other scans, another prior or other settings, or were
    changed by hand; and MODEL."""
    inference: Inference = field(default_factory=Inference)

    def run(self, command_line: Sequence[str]) -> int:
        """Segment every scan that is not done yet.

        Returns
        -------
        int
            0; 2 where nothing could be segmented, 3 where some scans could not, 130 when stopped.

        Raises
        ------
        ValueError
            If an input or option is at fault or OUT cannot be used; nothing is written then.
        """
        keep_freed_memory()
        folder = RunFolder(self.output)
        given = {"SCANS": self.scans, "PRIOR": self.prior, "--masks": self.masks, "--truth": self.truth}
        given["--tissues"] = self.tissues
        folder.check_apart_from({argument: path for argument, path in given.items() if path is not None})
        batch = check_batch(self)
        record = new_record(self, batch, command_line)
        earlier = folder.earlier_run(record, self.overwrite)
        if earlier is not None and not differing_settings(earlier, record):
            record = replace(record, images=earlier.images)
        if not self.overwrite:
            _check_same_scans(folder, record, batch)
        for why in batch.problems.values():
            print(f"limner: error: {why}", file=sys.stderr, flush=True)
        made = not folder.path.exists()
        running = folder.begin(record, earlier)
        try:
            running, found = _segment_all(batch, folder, running, finished_scans(running, earlier))
            if not any(isinstance(result, Result) for result in found.values()):
                folder.withdraw(earlier, made)
                return 2
            return _finish(batch, folder, running, found)
        except KeyboardInterrupt:
            print("\nStopped; the same command goes on from what is finished.", file=sys.stderr)
            return 130


@dataclass(frozen=True)
class Scan:
    """A scan's files.

    Parameters
    ----------
    path : Path
        The scan.
    mask : Path or None
        Its brain.
    key : str
        Hash of both.
    """

    path: Path
    mask: Path | None
    key: str


@dataclass(frozen=True)
class Batch:
    """What the user gave, checked.

    Parameters
    ----------
    prior : Prior
        What label maps taught.
    model : ImageModel or None
        What other scans taught, where PRIOR holds it.
    file : ModelFile
        PRIOR.
    inference : Inference
        Settings.
    scans : mapping of str to Scan
        By the name of their results.
    problems : mapping of str to str
        Why some of them cannot be used.
    truth : Truth
        To score with.
    tissues : list of int or None
        The tissue of each structure, where the user gave some.
    save_model : Path or None
        Where to keep what is learned.
    fit_key : str
        Hash of all that the encoder depends on.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    """

    prior: Prior
    model: ImageModel | None
    file: ModelFile
    inference: Inference
    scans: Mapping[str, Scan]
    problems: Mapping[str, str]
    truth: Truth
    tissues: list[int] | None
    save_model: Path | None
    fit_key: str
    device: str

    @property
    def structures(self) -> tuple[Merging, LabelTable]:
        """Structures, and their names and colours."""
        merging, colours = self.prior.merging, self.file.record.get("colours", {})
        rows = zip(merging.numbers[1:], merging.names[1:], strict=True)
        return merging, {n: Label(name, tuple(colours.get(str(n), default_colour(n)))) for n, name in rows}

    def key(self, name: str) -> str:
        """What the files of a scan depend on."""
        wanted = {setting: getattr(self.inference, setting) for setting in OF_RESULTS}
        return content_key(self.fit_key, self.inference.seed, wanted, self.scans[name].key)


def check_batch(command: PriorSegment) -> Batch:
    """Read the prior and every scan, mask and true label map once; nothing is computed or written.

    Raises
    ------
    ValueError
        The first fault found, in one line. A scan that cannot be used is none, unless there is no other.
    """
    command.inference.check()
    device, file = find_device(command.device), read_model(command.prior, TASK)
    prior, model = from_model(file)
    paths = list_volumes(command.scans, "SCANS")
    masks = {} if command.masks is None else companions(command.masks, paths, "--masks")
    without = [path for name, path in paths.items() if command.masks is not None and name not in masks]
    if without:
        raise ValueError(f"--masks: {command.masks} holds no mask of {without[0].name}; add one of the same name")
    keys = {n: content_key([hash_volume(p) for p in (path, masks.get(n)) if p]) for n, path in paths.items()}
    scans = {name: Scan(path, masks.get(name), keys[name]) for name, path in paths.items()}
    problems = _problems(scans)
    usable = sorted(keys[name] for name in scans if name not in problems)
    sha = hash_file(command.prior)
    tissues = _tissues(command, prior.merging, model)
    learned = sha if model is not None else content_key(sha, settings_of_fit(command.inference), tissues, usable)
    fit_key = content_key(ALGORITHM, learned)
    _check_save(command, model, fit_key)
    truth = read_truth(command, paths, prior.merging)
    options = command.inference, scans, problems, truth, tissues, command.save_model
    return Batch(prior, model, file, *options, fit_key, device)


def _tissues(command: PriorSegment, merging: Merging, model: ImageModel | None) -> list[int] | None:
    """The tissue of each structure, where the user gave some."""
    if command.tissues is None:
        return None
    if model is not None:
        raise ValueError(
            f"--tissues: {command.prior} was fitted to scans already, and knows what is equally bright; leave it out, "
            "or give the prior"
        )
    return read_shared_tissues(command.tissues, merging.structures)


def settings_of_fit(inference: Inference) -> dict[str, Any]:
    """Settings that what is learned from the scans depends on."""
    return {name: value for name, value in asdict(inference).items() if name not in OF_RESULTS}


def read_truth(command: PriorSegment, scans: Mapping[str, Path], merging: Merging) -> Truth:
    """True label maps and their table, read once and checked."""
    if command.truth is None:
        if command.truth_merge is not None:
            raise ValueError("--truth-merge: it says what the labels of --truth are; give that too")
        return Truth()
    own = None if command.truth_merge is None else read_merging(command.truth_merge)
    truth = Truth(companions(command.truth, scans, "--truth"), own)
    truth.check(merging)
    return truth


def _check_save(command: PriorSegment, model: ImageModel | None, fit_key: str) -> None:
    """MODEL may be there already where this very run wrote it."""
    if command.save_model is None:
        return
    if model is not None:
        raise ValueError(f"--save-model: nothing is learned with {command.prior}, which is such a model; leave it out")
    if command.save_model.resolve() == command.prior.resolve():
        raise ValueError(f"--save-model: {command.save_model} is PRIOR, which would be lost; name another file")
    check_model_path(command.save_model, command.overwrite or _is_of(command.save_model, fit_key), "--save-model")


def _is_of(path: Path, fit_key: str) -> bool:
    """Whether a file is the model that was fitted under a key."""
    with suppress(ValueError):
        return path.is_file() and read_model(path, TASK).record.get("fit_key") == fit_key
    return False


def _problems(scans: Mapping[str, Scan]) -> dict[str, str]:
    """Why scans cannot be used, by name."""
    problems = {}
    for name, scan in scans.items():
        try:
            brain_of(read_scan(scan.path), scan.mask)
        except ValueError as error:
            problems[name] = _plain(error)
    if len(problems) == len(scans):
        raise ValueError(next(iter(problems.values())))
    return problems


def _plain(error: Exception) -> str:
    return " ".join(str(error).split())


def new_record(command: PriorSegment, batch: Batch, command_line: Sequence[str]) -> RunRecord:
    """The record of a run that is to begin: what its results depend on, and what else was asked for."""
    sha, every = hash_file(command.prior), asdict(batch.inference)
    masks = [scan.key for scan in batch.scans.values()] if command.masks is not None else None
    settings = {"algorithm": ALGORITHM, "prior": sha, "seed": batch.inference.seed}
    inputs = {"prior": {command.prior.name: sha}}
    if batch.model is None:  # all scans of the batch teach the encoder: with others it is another run
        settings |= {"tissues": batch.tissues}
        settings |= {**settings_of_fit(batch.inference), "masks": None if masks is None else content_key(masks)}
        inputs["images"] = {scan.path.name: hash_volume(scan.path) for scan in batch.scans.values()}
    inputs["tissues"] = {} if command.tissues is None else {command.tissues.name: hash_file(command.tissues)}
    inputs["truth"] = {path.name: hash_volume(path) for path in batch.truth.files.values()}
    return RunRecord(
        command=tuple(command_line),
        settings=settings,
        inputs=inputs,
        options={name: every[name] for name in OF_RESULTS},
        device=batch.device,
        seed=batch.inference.seed,
    )


def _check_same_scans(folder: RunFolder, record: RunRecord, batch: Batch) -> None:
    """Refuse to replace what was found in one scan by what is found in another of the same name."""
    for name, scan in batch.scans.items():
        entry = record.images.get(name, {})
        path = str(scan.path.resolve())
        if entry.get("path", path) != path and entry["scan"] != scan.key:
            raise ValueError(
                f"--output: {folder.path} holds results of another scan called {name}, {entry['path']}; name another "
                "folder, or add --overwrite to replace them"
            )


def finished_scans(running: RunRecord, earlier: RunRecord | None) -> dict[str, tuple[str, Result]]:
    """Scans whose results are all there as they were written: by name their key and what was found."""
    done = {}
    for name, entry in running.images.items():
        files = entry.get("files", ())
        if earlier is not None and files and all(_intact(file, running, earlier) for file in files):
            done[name] = entry["key"], Result.from_entry(entry)
    return done


def _intact(file: str, running: RunRecord, earlier: RunRecord) -> bool:
    return file in earlier.outputs and running.outputs.get(file) == earlier.outputs[file]


# ---- the work -------------------------------------------------------------------------------------------------------


def _segment_all(
    batch: Batch, folder: RunFolder, running: RunRecord, done: Mapping[str, tuple[str, Result]]
) -> tuple[RunRecord, dict[str, Result | str]]:
    """One scan after the other; gives the record, and what was found in each or why nothing."""
    found: dict[str, Result | str] = dict(batch.problems)
    wanted = [name for name in batch.scans if name not in found]
    ready = {name: done[name][1] for name in wanted if name in done and done[name][0] == batch.key(name)}
    if len(ready) < len(wanted) or (batch.save_model is not None and not _is_of(batch.save_model, batch.fit_key)):
        batch, failed = with_model(batch, folder, wanted)
        found |= failed
    for name in batch.scans:
        if isinstance(why := found.get(name), str):
            running = _noted(folder, running, name, {**running.images.get(name, {}), "problem": why})
            continue
        if name in ready:
            result = ready[name]
            entry = {key: value for key, value in running.images[name].items() if key != "problem"}
            running = _noted(folder, running, name, entry)
        else:
            try:
                result, running = _segment_one(batch, folder, running, name)
            except ValueError as error:
                found[name] = _reported(batch.scans[name], error)
                running = _noted(folder, running, name, {"problem": _plain(error)})
                continue
        found[name] = result
        print(result.in_words(name), flush=True)
        for note in result.notes:
            warnings.warn(f"{name}: {note}", stacklevel=2)
    return running, {name: found[name] for name in batch.scans}


def with_model(batch: Batch, folder: RunFolder, names: Sequence[str]) -> tuple[Batch, dict[str, str]]:
    """The batch with an encoder: that of PRIOR, what was kept, or what is learned now; and which scans failed."""
    device = batch.device.split()[0]
    failed: dict[str, str] = {}
    model, kept = batch.model, folder.path / ".resume" / "model.safetensors"
    if model is None and _is_of(kept, batch.fit_key):
        model = from_model(read_model(kept, TASK))[1]
    if model is None:
        scans, failed = align_all(batch, folder.store, names)
        if not scans:
            return batch, failed
        model, losses = fit_to(batch, list(scans.values()), device)
        course = {"fitted_to": [batch.scans[name].path.name for name in scans], "fitted": utc_now()}
        record = {**batch.file.record, **course, "fitted_loss": thinned(losses), "fit_key": batch.fit_key}
        kept.parent.mkdir(parents=True, exist_ok=True)
        to_model(batch.prior, to_plain(record), model).write(kept)
    if batch.save_model is not None and not _is_of(batch.save_model, batch.fit_key):
        batch.save_model.parent.mkdir(parents=True, exist_ok=True)
        read_model(kept, TASK).write(batch.save_model)
        print(f"Model: {batch.save_model}", file=sys.stderr)
    batch.prior.network.to(device)
    moved = ImageModel(model.encoder.to(device), *(v.to(device) for v in (model.means, model.sigmas, model.tissues)))
    return replace(batch, model=moved), failed


def align_all(batch: Batch, store: Store, names: Sequence[str]) -> tuple[dict[str, AlignedScan], dict[str, str]]:
    """Scans on the template's grid; and why others are not, by name."""
    scans: dict[str, AlignedScan] = {}
    failed: dict[str, str] = {}
    with progress_on(sys.stderr) as report:
        for done, name in enumerate(names, start=1):
            try:
                scans[name] = aligned(batch, name, store)
            except ValueError as error:
                failed[name] = _reported(batch.scans[name], error)
            report("alignment", done, len(names))
    return scans, failed


def _reported(scan: Scan, error: ValueError) -> str:
    why = _plain(error)
    print(f"limner: error: {scan.path.name}: {why}", file=sys.stderr, flush=True)
    return why


def aligned(batch: Batch, name: str, store: Store) -> AlignedScan:
    """A scan on the template's grid; how it lies is kept in `store`.

    Raises
    ------
    ValueError
        If it does not align.
    """
    scan, template = batch.scans[name], batch.prior.template
    volume = read_scan(scan.path)
    brain = brain_of(volume, scan.mask)
    key = content_key(ALGORITHM, scan.key, template.pixels, template.space)
    parts = stored(store, f"alignment-{scan.key}", key, lambda: _to_arrays(align(volume, template, brain)))
    alignment = _from_arrays(parts)
    if alignment.failed:
        raise ValueError(f"align(): {alignment.failed}; look at it beside the template, or give its brain (--masks)")
    return place(volume, alignment, template, brain)


def _to_arrays(alignment: Alignment) -> dict[str, np.ndarray[Any, Any]]:
    parts = {name: np.array(value) for name, value in vars(alignment).items() if name != "transform"}
    return {**parts, **{name: np.array(value) for name, value in asdict(alignment.transform).items()}}


def _from_arrays(parts: Mapping[str, np.ndarray[Any, Any]]) -> Alignment:
    transform = transform_of(parts["linear"], parts["shift"])
    return Alignment(transform, **{n: v.item() for n, v in parts.items() if n not in ("linear", "shift")})


def fit_to(batch: Batch, scans: Sequence[AlignedScan], device: str) -> tuple[ImageModel, list[float]]:
    """Learn from the scans, and say how far it is."""
    with progress_on(sys.stderr) as report:
        tell = lambda n, of: report("fit to scans", n, of)  # noqa: E731
        return fit_encoder(scans, batch.prior, batch.inference, device, tell, batch.tissues)


def _segment_one(batch: Batch, folder: RunFolder, running: RunRecord, name: str) -> tuple[Result, RunRecord]:
    """Segment a scan, put its files in place, and note that it is done."""
    began, scan = time.monotonic(), aligned(batch, name, folder.store)
    assert batch.model is not None
    found = segment(scan, batch.prior, batch.model, batch.inference)
    results: list[Result] = []

    def write(staging: Path) -> None:
        results.append(write_scan(staging, name, scan, found, batch.prior.merging))

    running = folder.put(running, write, _files_of(name, running))
    own = batch.scans[name]
    entry = {"key": batch.key(name), "path": str(own.path.resolve()), "scan": own.key, **asdict(results[0])}
    course = {"seconds": round(time.monotonic() - began, 2), **_course(found.bound)}
    return results[0], _noted(folder, running, name, {**entry, **course})


def _course(bound: Sequence[float]) -> dict[str, Any]:
    """Of the refinement, for the record: log likelihood in nats at first and in the end; nothing without it."""
    return {"refinement": {"first": bound[0], "last": bound[-1], "iterations": len(bound)}} if bound else {}


def _files_of(name: str, running: RunRecord) -> list[str]:
    """All files that a scan of this name left, by this run or an earlier one of other settings."""
    own, endings = re.escape(name), "|".join(map(re.escape, (*ENDINGS, ".json")))
    one = re.compile(rf"((labels|uncertainty|transforms)/{own}|samples/{own}_\d+)({endings})")
    return [file for file in running.outputs if one.fullmatch(file)]


def _noted(folder: RunFolder, running: RunRecord, name: str, entry: Mapping[str, Any]) -> RunRecord:
    """The record with what came of a scan, written."""
    running = replace(running, images={**running.images, name: entry})
    folder.note(running)
    return running


def _finish(batch: Batch, folder: RunFolder, running: RunRecord, found: Mapping[str, Result | str]) -> int:
    """Write what is of all scans, complete the record, say what came out; gives the exit status."""
    problems = {name: result for name, result in found.items() if isinstance(result, str)}
    results = {name: result for name, result in found.items() if isinstance(result, Result)}
    images = {name: batch.scans[name].path for name in results}
    for name, entry in running.images.items():  # of an earlier run with the same model
        if name not in found and "files" in entry:
            results[name], images[name] = Result.from_entry(entry), Path(entry["path"])
    own = {file for entry in running.images.values() for file in entry.get("files", ())} | {*SUMMARIES}
    running = folder.put(running, lambda _: None, set(running.outputs) - own)  # what other settings left
    views = views_of(folder.path, results, images, batch.truth, batch.structures)
    notes = tuple(f"{name}: {note}" for name, result in results.items() for note in result.notes)
    failed = {batch.scans[name].path.name: why for name, why in problems.items()}
    report = PriorReport(views, failed, batch.structures[1], settings_shown(running), notes)

    def write(staging: Path) -> None:
        write_summaries(staging, results, report, bool(batch.truth.files))

    running = folder.put(running, write, {*SUMMARIES} & set(running.outputs))
    notes = (*(f"{name}: {why}" for name, why in failed.items()), *notes)
    folder.note(replace(running.completed(summary=report.summary, notes=notes), replaceable={}))
    print(report.summary)
    print(f"Report: {folder.path / 'report.html'}", file=sys.stderr)
    return 3 if problems else 0


def settings_shown(record: RunRecord) -> dict[str, object]:
    """Settings for the report: the prior by its name."""
    shown = {**record.settings, **record.options, "prior": ", ".join(record.inputs["prior"])}
    return {name: value for name, value in shown.items() if value is not None and name not in ("algorithm", "masks")}
