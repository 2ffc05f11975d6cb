"""What `limner prior segment` leaves of each scan and of all together: labels, uncertainty, volumes, Dice, report."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from limner.aligned_scan import AlignedScan, spread
from limner.cli.volume_files import labels_on
from limner.io import read, read_label_volume, write_result, write_table
from limner.label_merging import Merging
from limner.methods.anatomical_prior import Found
from limner.metrics.pixels import dice_per_label
from limner.report.anatomical_prior import PriorReport, ScanView, StructureRow
from limner.volume import LabelTable

SUMMARIES = ("structures.csv", "volumes.csv", "dice.csv", "report.html")  # of all scans


@dataclass(frozen=True)
class Result:
    """What was found in a scan, without its voxels.

    Parameters
    ----------
    files : tuple of str
        Files written, relative to OUT: labels, uncertainty, transform, then samples.
    overlap : float
        Dice of the scan's brain with the template's.
    volumes : mapping of str to tuple of float
        By label: mm3, and the least and most that are plausible.
    uncertainty : float
        Mean over the brain.
    notes : tuple of str
        Warnings.
    """

    files: tuple[str, ...]
    overlap: float
    volumes: Mapping[str, tuple[float, float, float]]
    uncertainty: float
    notes: tuple[str, ...] = ()

    @classmethod
    def from_entry(cls, entry: Mapping[str, Any]) -> Result:
        """From what `run.json` says of a scan."""
        volumes = {label: (float(a), float(b), float(c)) for label, (a, b, c) in entry["volumes"].items()}
        return cls(tuple(entry["files"]), entry["overlap"], volumes, entry["uncertainty"], tuple(entry["notes"]))

    def in_words(self, name: str) -> str:
        """One line for the user."""
        total = sum(mm3 for mm3, _, _ in self.volumes.values())
        return (
            f"{name}: {total:.4g} mm3 in all structures, overlap {self.overlap:.2f}, uncertainty {self.uncertainty:.2f}"
        )


@dataclass(frozen=True)
class Truth:
    """True label maps, for scores alone.

    Parameters
    ----------
    files : mapping of str to Path
        By scan.
    merging : Merging or None
        Their own structures, named as the prior's; None: they are numbered as the prior's label maps.
    """

    files: Mapping[str, Path] = field(default_factory=dict)
    merging: Merging | None = None

    def check(self, merging: Merging) -> None:
        """Read every map once.

        Raises
        ------
        ValueError
            If a file cannot be read, holds labels that `merging` of its own does not know, or that names structures
            that the prior does not have.
        """
        if self.merging is not None:
            known = {name.lower() for name in merging.names}
            strange = [name for name in self.merging.names if name.lower() not in known]
            if strange:
                raise ValueError(
                    f"--truth-merge: the prior has no structure {', '.join(strange)}, only {', '.join(merging.names)}; "
                    "name them as in the prior, or put their labels into the row background"
                )
        for path in self.files.values():
            self._classes(path, read_label_volume(path).labels, merging)

    def dice(self, name: str, found: NDArray[np.integer[Any]], space: Any, merging: Merging) -> dict[int, float]:
        """Dice by label of the structures that the truth tells of; none where the scan has no truth.

        Parameters
        ----------
        name : str
            Of the scan.
        found : ndarray of int
            Labels on the scan's grid.
        space : Space
            The scan's grid.
        merging : Merging
            Of the prior.
        """
        if name not in self.files:
            return {}
        path = self.files[name]
        true = self._classes(path, labels_on(space, read_label_volume(path)), merging)
        scores = dice_per_label(merging.to_classes(found), true)
        told = range(len(merging.names)) if self.merging is None else set(self._own_to_prior(merging).tolist())
        return {merging.numbers[i]: scores[i] for i in scores if i in told}

    def _classes(self, path: Path, labels: NDArray[np.integer[Any]], merging: Merging) -> NDArray[np.integer[Any]]:
        """In the prior's classes; without a table labels that it does not know are background."""
        if self.merging is not None:
            return self._own_to_prior(merging)[self.merging.to_classes(labels, str(path))]
        known = [label for _, members in merging.structures for label in members]
        return merging.to_classes(np.where(np.isin(labels, known), labels, 0), str(path))

    def _own_to_prior(self, merging: Merging) -> NDArray[np.integer[Any]]:
        assert self.merging is not None
        number = {name.lower(): i for i, name in enumerate(merging.names)}
        return np.array([number[name.lower()] for name in self.merging.names])


def write_scan(folder: Path, name: str, scan: AlignedScan, found: Found, merging: Merging) -> Result:
    """Write what was found in a scan, on its own grid and in its own format.

    Parameters
    ----------
    folder : Path
        Where to make ``labels``, ``uncertainty``, ``transforms`` and, where there are any, ``samples``.
    name : str
        Of the files.
    scan : AlignedScan
        The scan.
    found : Found
        As of `limner.methods.anatomical_prior.segment`.
    merging : Merging
        Of the prior: files hold its labels, not classes.
    """
    (folder / "transforms").mkdir()
    transform = folder / "transforms" / f"{name}.json"
    scan.alignment.write(transform)
    files = [
        write_result(folder / "labels", name, _labels(found.classes, scan, merging), scan.volume),
        write_result(folder / "uncertainty", name, spread(found.uncertainty, scan.brain), scan.volume),
        transform,
    ]
    for i, classes in enumerate(found.samples, start=1):
        files.append(write_result(folder / "samples", f"{name}_{i}", _labels(classes, scan, merging), scan.volume))
    return Result(
        tuple(path.relative_to(folder).as_posix() for path in files),
        scan.alignment.overlap,
        _volumes(found, scan, merging),
        float(found.uncertainty.mean()),
        notes_on(scan),
    )


def notes_on(scan: AlignedScan) -> tuple[str, ...]:
    """What the user should know of an alignment that did not fail."""
    if not scan.alignment.turned:
        return ()
    note = "its header gives another orientation than what was found; check that left is left, for that hangs on it"
    return (note,)


def _labels(classes: NDArray[np.integer[Any]], scan: AlignedScan, merging: Merging) -> NDArray[np.integer[Any]]:
    return spread(merging.to_labels(classes), scan.brain)


def _volumes(found: Found, scan: AlignedScan, merging: Merging) -> dict[str, tuple[float, float, float]]:
    voxel = float(np.prod(scan.volume.space.spacing))
    columns = voxel * np.stack([found.volumes, *found.intervals], axis=1)
    rows = zip(merging.numbers, columns.tolist(), strict=True)
    return {str(label): (mm3, low, high) for label, (mm3, low, high) in rows if label}


def scan_view(
    output: Path, name: str, image: Path, result: Result, truth: Truth, prior: tuple[Merging, LabelTable]
) -> ScanView:
    """What the report shows of a scan, cut to its structures, read from its files.

    Parameters
    ----------
    output : Path
        OUT, results in place.
    name : str
        Of the scan.
    image : Path
        Its file.
    result : Result
        What was found.
    truth : Truth
        To score it.
    prior : (Merging, LabelTable)
        Structures, and their names and colours.
    """
    merging, table = prior
    volume, labels = read(image), read_label_volume(output / result.files[0]).labels
    uncertainty = read(output / result.files[1]).pixels.astype(np.float32)
    dice = truth.dice(name, labels, volume.space, merging)
    rows = tuple(
        StructureRow(label, table[label].name, *result.volumes[str(label)], dice.get(label))
        for label in merging.numbers[1:]
    )
    return ScanView(
        name, volume.pixels, labels, uncertainty, volume.space, result.overlap, rows, result.notes
    ).cropped()


def write_summaries(folder: Path, results: Mapping[str, Result], report: PriorReport, scored: bool) -> None:
    """Write ``structures.csv``, ``volumes.csv``, ``report.html`` and, where there is truth, ``dice.csv``."""
    write_table(folder / "structures.csv", report.table, "csv")
    volumes = (
        (name, report.table[int(label)].name, label, *(f"{mm3:.6g}" for mm3 in three))
        for name, result in results.items()
        for label, three in result.volumes.items()
    )
    _write_csv(folder / "volumes.csv", ("scan", "structure", "label", "mm3", "low", "high"), volumes)
    if scored:
        rows = ((view.name, row) for view in report.scans for row in view.rows)
        dice = ((scan, row.name, row.label, f"{row.dice:.4f}") for scan, row in rows if row.dice is not None)
        _write_csv(folder / "dice.csv", ("scan", "structure", "label", "dice"), dice)
    report.write(folder / "report.html")


def _write_csv(path: Path, header: Sequence[str], rows: Iterable[Sequence[object]]) -> None:
    with path.open("w", newline="", encoding="utf-8") as handle:
        writer = csv.writer(handle, lineterminator="\n")
        writer.writerow(header)
        writer.writerows(rows)


def views_of(
    output: Path,
    results: Mapping[str, Result],
    images: Mapping[str, Path],
    truth: Truth,
    prior: tuple[Merging, LabelTable],
) -> list[ScanView]:
    """Those of all scans whose files can still be read: one that was changed since must not cost the report."""
    views = []
    for name, result in results.items():
        with suppress(ValueError, OSError):
            views.append(scan_view(output, name, images[name], result, truth, prior))
    return views
