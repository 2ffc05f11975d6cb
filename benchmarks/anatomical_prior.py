"""Structures of `human_t1` found with no labelled scan, from the label maps of `human_labelmaps`: Dice and seconds.

    python benchmarks/anatomical_prior.py [--scans N] [--label-maps N] [--out FILE]

Rows: the location prior alone after affine alignment. Label maps and scans are aligned to `human_template` at 2 mm;
alignments are kept in bench-out/anatomical_prior, and a stopped run goes on with the first that is missing. Dice is
over the 12 structures of `human_t1/structures.json`, left and right together, on each scan's own grid; the two
protocols draw borders differently, so it cannot reach 1. The scans' labels are for this score alone. Seconds are those
of one processor core.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from limner.io import read, read_label_volume
from limner.label_merging import Merging
from limner.location_prior import label_frequencies
from limner.metrics.pixels import dice
from limner.registration.template import Template, make_template
from limner.registration.volume_affine import Alignment, align, align_labels, read_alignment
from limner.registration.volume_transform import covered, resample
from limner.run_record import machine, package_versions
from limner.volume import LabelMap, Volume

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))
KEPT = Path("bench-out/anatomical_prior")
OTHERS = {
    "background": range(500, 531),
    "cerebral white matter": (25, 57),  # lesions in it
    "cerebrospinal fluid": (14, 15, 24, 72),
    "other": (26, 28, 30, 58, 60, 62, 80, 85, 136, 137, 163, 164),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scans", type=int, default=15)
    parser.add_argument("--label-maps", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/anatomical_prior.json"))
    given = parser.parse_args()
    if not (DATA / "human_t1").is_dir():
        print(f"skipped: no data at {DATA}")
        return
    template = make_template(read(DATA / "human_template/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"))
    merging, truth = structures()
    maps = sorted((DATA / "human_labelmaps/labels_1mm").glob("*.nii.gz"))[: given.label_maps]
    prior = label_frequencies(aligned_maps(maps, merging, template), len(merging.names), template.space.spacing)
    scans = sorted((DATA / "human_t1/t1_2mm").glob("*.nii.gz"))[: given.scans]
    rows = [
        {"name": "location prior", "label_maps": len(maps), **scored(path, prior, template, truth)} for path in scans
    ]
    for row in rows:
        print(row["scan"], row["failed"] or f"{row['mean_dice']:.3f}")
    scores = [row["mean_dice"] for row in rows if not row["failed"]]
    print(f"location prior: mean Dice {np.mean(scores):.3f} on {len(scores)} of {len(rows)} scans")
    about = {"versions": package_versions(), "machine": machine()}
    given.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


def structures() -> tuple[Merging, Merging]:
    """The 12 structures and what else there is, in the label maps' numbers; and the 12 in the scans' own numbers."""
    table = json.loads((DATA / "human_t1/structures.json").read_text())
    names = [name for name in table if not name.startswith("_")]
    members = {"background": [0], **{name: list(table[name]["freesurfer"]) for name in names}}
    for name, labels in OTHERS.items():
        members.setdefault(name, []).extend(labels)
    of_scans = {name: tuple(table[name]["neuromorphometrics"]) for name in names}
    rest = tuple(sorted(set(range(256)) - {n for labels in of_scans.values() for n in labels} - {0}))
    return (
        Merging(tuple((name, tuple(labels)) for name, labels in members.items())),
        Merging((("background", (0, *rest)), *of_scans.items())),
    )


def kept(name: str, find: Callable[[], Alignment]) -> tuple[Alignment, float]:
    """An alignment and the seconds it took, from an earlier run where there is one."""
    file, seconds = KEPT / f"{name}.json", KEPT / f"{name}.seconds"
    if not seconds.exists():
        KEPT.mkdir(parents=True, exist_ok=True)
        began = time.process_time()
        find().write(file)
        seconds.write_text(f"{time.process_time() - began}")
    return read_alignment(file), float(seconds.read_text())


def aligned_maps(
    paths: list[Path], merging: Merging, template: Template
) -> Iterator[tuple[NDArray[np.integer], NDArray[np.bool_]]]:
    """Classes on the template's grid, and where the map's field of view covers it."""
    for path in paths:
        label_map = read_label_volume(path)
        classes = LabelMap(merging.to_classes(label_map.labels, str(path)), label_map.space)
        alignment, seconds = kept(path.name, lambda classes=classes: align_labels(classes, template))
        print(f"{path.name}: overlap {alignment.overlap:.3f}, {seconds:.1f} s {alignment.failed}", flush=True)
        if not alignment.failed:
            known = covered(label_map.space, template.space, alignment.transform)
            yield resample(classes, template.space, alignment.transform).labels, known


def scored(path: Path, prior: NDArray[np.float32], template: Template, truth: Merging) -> dict[str, object]:
    """Dice of the prior's likeliest label on one scan's own grid."""
    scan: Volume = read(path)
    alignment, seconds = kept(path.name, lambda: align(scan, template))
    fit = {"overlap": alignment.overlap, "information": alignment.information, "alignment_seconds": seconds}
    if alignment.failed:
        return {"scan": path.name, "failed": alignment.failed, **fit}
    likeliest = LabelMap(prior.argmax(axis=0).astype(np.uint8), template.space)
    found = resample(likeliest, scan.space, alignment.transform.inverse()).labels
    true = truth.to_classes(read_label_volume(DATA / "human_t1/labels_2mm" / path.name, scan).labels)
    scores = {name: dice(found, true, i) for i, name in enumerate(truth.names) if i}
    return {"scan": path.name, "failed": "", "mean_dice": float(np.mean(list(scores.values()))), "dice": scores, **fit}


if __name__ == "__main__":
    main()
