"""`limner stack align` on the mouse stack, displaced on purpose: what is left of rotation and shift, and false alarms.

    python benchmarks/stack_align.py [--seeds 0 1 2] [--fusion] [--out benchmarks/results/stack_align.json]

Each section is turned by up to 10 degrees, shifted by up to 10 % of height and width, and made up to 20 % brighter or
darker. What is left is measured apart from a smooth drift along the stack, which the sections alone cannot tell from
anatomy. `--fusion` also completes the stack (`--method fusion`, every 10th section labelled), as it was, displaced, and
aligned. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from pathlib import Path

import numpy as np
from scipy.ndimage import gaussian_filter1d

from limner.annotations import SectionLabels
from limner.io import read, read_label_volume
from limner.io.sections import border_median
from limner.methods.stack_completion import complete
from limner.metrics.pixels import score_stack
from limner.registration.section_resampling import moved, small_section
from limner.registration.stack_alignment import align, find_faults, inspect, working_grid
from limner.run_record import machine, package_versions
from limner.space import Space
from limner.stack_settings import Settings
from limner.volume import LabelMap, Volume

DEGREES, SHARE, BRIGHTNESS = 10.0, 0.1, 0.2
PADDING = 30  # pixels on every side, so that no tissue leaves the canvas
DRIFT = 7.5  # sections; standard deviation of the Gaussian that smooths what counts as drift
EVERY, LAST_LABELLED, WITHIN_MM = 10, 250, 0.2
ENDS = slice(20, 250)  # beyond, sections are small and nearly round


def true_transforms(n: int, extent: tuple[float, float], seed: int) -> tuple[np.ndarray, np.ndarray]:
    """Transforms from the undisplaced sections to the displaced ones (n, 2, 3), mm, and brightness (n,)."""
    rng = np.random.default_rng(seed)
    angle = np.radians(rng.uniform(-DEGREES, DEGREES, n))
    shift = rng.uniform(-SHARE, SHARE, (n, 2)) * extent
    rows = [np.cos(angle), -np.sin(angle), shift[:, 0], np.sin(angle), np.cos(angle), shift[:, 1]]
    return np.stack(rows, axis=1).reshape(n, 2, 3), rng.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS, n)


def inverse(matrix: np.ndarray) -> np.ndarray:
    return np.column_stack([matrix[:, :2].T, -matrix[:, :2].T @ matrix[:, 2]])


def composed(first: np.ndarray, then: np.ndarray) -> np.ndarray:
    return np.column_stack([then[:, :2] @ first[:, :2], then[:, :2] @ first[:, 2] + then[:, 2]])


def resampled(sections: np.ndarray, matrices: np.ndarray, space: Space, labels: bool = False) -> np.ndarray:
    """Every section seen through its transform, on the grid of `space`."""
    made = []
    for section, matrix in zip(sections, matrices, strict=True):
        fill = 0 if labels else border_median(section)
        made.append(moved(section, matrix, space.spacing[1:], space.shape[1:], fill=fill, nearest=labels))
    return np.stack(made)


def left_over(found: np.ndarray, true: np.ndarray) -> dict[str, list[float]]:
    """Median, 95th percentile and worst of what is left beside a smooth drift: degrees, and mm in the middle."""
    relative = true[:, :, :2].transpose(0, 2, 1) @ found[:, :, :2]
    degrees = np.degrees(np.arctan2(relative[:, 1, 0], relative[:, 0, 0]))
    at = np.einsum("nji,nj->ni", found[:, :, :2], true[:, :, 2] - found[:, :, 2])
    beside = np.abs(degrees - gaussian_filter1d(degrees, DRIFT, mode="nearest"))
    mm = np.hypot(*(at - gaussian_filter1d(at, DRIFT, axis=0, mode="nearest")).T)
    rows = {"degrees": beside, "mm": mm, "degrees_without_ends": beside[ENDS], "mm_without_ends": mm[ENDS]}
    summary = {k: [float(np.median(v)), float(np.percentile(v, 95)), float(v.max())] for k, v in rows.items()}
    return summary | {"drift_degrees": [float(degrees.std())], "drift_mm": at.std(axis=0).tolist()}


def small(sections: np.ndarray, spacing: tuple[float, float]) -> tuple[np.ndarray, tuple[float, float]]:
    shape, step = working_grid(sections.shape[1:3], spacing)
    return np.stack([small_section(s, spacing, shape, step, border_median(s)) for s in sections]), step


def fused(images: np.ndarray, labels: np.ndarray, space: Space) -> dict[str, float]:
    labelled = tuple(range(0, LAST_LABELLED + 1, EVERY))
    known = np.zeros_like(labels)
    known[list(labelled)] = labels[list(labelled)]
    annotations = SectionLabels(LabelMap(known, space), labelled)
    done = complete(Volume(images, space), annotations, Settings(method="fusion"), device="cpu")
    sections = [z for z in range(LAST_LABELLED) if z not in labelled]
    score = score_stack(done.labels, LabelMap(labels, space), sections, WITHIN_MM)
    return {"median": score.median_accuracy, "minimum": score.minimum_accuracy, "dice": score.mean_dice}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--fusion", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_align.json"))
    arguments = parser.parse_args()
    data = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    if not data.is_dir():
        print(f"skipped: no data at {data}")
        return
    images = read(data / "stpt_native_50x40x40um.nii.gz")
    labels = read_label_volume(data / "coarse_native_50x40x40um.nii.gz", like=images).labels
    spacing, (n, height, width) = images.space.spacing[1:], images.space.shape
    space = Space((n, height + 2 * PADDING, width + 2 * PADDING), images.space.spacing)
    as_it_is = np.tile(np.eye(2, 3), (n, 1, 1))
    result: dict[str, object] = {"versions": package_versions(), "machine": machine()}

    def note(name: str, value: object) -> None:
        result[name] = value
        print(name, json.dumps(value), flush=True)

    note("false_alarms", find_faults(images.pixels[:, None].astype(np.float32), spacing).faults())
    given, step = small(images.pixels, spacing)
    inspection = inspect(given, step)
    note("false_alarms_of_align", inspection.faults())
    note("undisplaced", left_over(align(given, step, inspection), as_it_is))
    for seed in arguments.seeds:
        true, brightness = true_transforms(n, (height * spacing[0], width * spacing[1]), seed)
        to_true = np.stack([inverse(matrix) for matrix in true])
        displaced = resampled(images.pixels, to_true, space)
        displaced = np.rint(displaced * brightness[:, None, None]).clip(0, 65535).astype(images.pixels.dtype)
        began, cpu = time.perf_counter(), time.process_time()
        given, step = small(displaced, spacing)
        inspection = inspect(given, step)
        found = align(given, step, inspection)
        seconds = {"wall": (time.perf_counter() - began) / n, "cpu": (time.process_time() - cpu) / n}
        faults = {str(z): fault for z, fault in inspection.faults().items()}
        note(f"seed {seed}", left_over(found, true) | {"seconds_a_section": seconds, "faults": faults})
        if arguments.fusion and seed == arguments.seeds[0]:
            # on the aligned sections labels are drawn, not resampled twice
            onto = np.stack([composed(f, t) for f, t in zip(found, to_true, strict=True)])
            back = resampled(displaced, found, space)
            still = resampled(images.pixels, as_it_is, space)
            note("fusion undisplaced", fused(still, resampled(labels, as_it_is, space, labels=True), space))
            note("fusion displaced", fused(displaced, resampled(labels, to_true, space, labels=True), space))
            note("fusion aligned", fused(back, resampled(labels, onto, space, labels=True), space))
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
