"""The four methods of stack completion beside interpolation of signed distances, on the mouse stack.

    python benchmarks/stack_methods.py [--out benchmarks/results/stack_methods.json] [--every 10] [--settings key=value]

Coarse labels, every n-th section labelled from 0 to 250, the others scored within 0.2 mm of the structures. Reads
LIMNER_DATA (default ../shared/data). The labels are registration-derived: they compare methods and prove nothing about
anatomy.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from scipy.stats import wilcoxon

from limner.annotations import SectionLabels
from limner.completion import Completion, Size, areas
from limner.io import read, read_label_volume
from limner.label_fusion import blend
from limner.methods.stack_completion import complete
from limner.metrics.pixels import expected_calibration_error, score_stack
from limner.run_record import Store, machine, package_versions
from limner.section_fusion import FusionOptions, SectionFusion
from limner.stack_settings import Settings
from limner.volume import LabelMap

LAST_LABELLED = 250
WITHIN_MM = 0.2


def interpolated(annotations: SectionLabels, sections: list[int], clip_mm: float = 1.0) -> LabelMap:
    """Linear interpolation of signed distances, without images: the rival to beat."""
    given = annotations.label_map
    space = given.space
    stack = SectionFusion(
        np.zeros((space.shape[0], 1, *space.shape[1:]), np.float32),
        given.labels,
        annotations.labelled,
        space.section_positions,
        (space.spacing[1], space.spacing[2]),
        FusionOptions(interpolation="linear", clip_mm=clip_mm, label_flow=False),
    )
    labels = given.labels.copy()
    for z in sections:
        distances, weights, covered = stack.blended_distances(z)
        structures = np.asarray(stack.structures(z))
        labels[z] = structures[blend(distances, weights, covered, 1.0).argmax(dim=0).numpy()]
    return LabelMap(labels, space)


def calibration_error(uncertainty: np.ndarray, predicted: np.ndarray, truth: np.ndarray, sections: list[int]) -> float:
    """Expected calibration error of what the user is shown, on withheld labels inside predicted or true structures."""
    inside = (predicted[sections] > 0) | (truth[sections] > 0)
    correct = (predicted[sections] == truth[sections])[inside]
    return float(expected_calibration_error(1 - uncertainty[sections][inside], correct))


def area_coverage(done: Completion, truth: np.ndarray, sections: list[int]) -> tuple[float, float]:
    """How often the interval of 90 % holds a structure's true area on a withheld section; and its median width.

    Of structures that are there or may be; the width is relative to the likeliest area.
    """
    pixel = done.labels.space.spacing[1] * done.labels.space.spacing[2]
    found, held, widths = areas(done), [], []
    for z in sections:
        sizes = {size.structure: size for size in found[z]}
        for structure in {*sizes, *np.unique(truth[z]).tolist()} - {0}:
            size = sizes.get(structure, Size(structure, 0.0, 0.0, 0.0))
            true = (truth[z] == structure).sum() * pixel
            held.append(size.fewest - 1e-9 <= true <= size.most + 1e-9)
            if size.likeliest:
                widths.append((size.most - size.fewest) / size.likeliest)
    return float(np.mean(held)), float(np.median(widths))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_methods.json"))
    parser.add_argument("--every", type=int, default=10)
    parser.add_argument("--methods", default="gem,product,network,fusion")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--store", type=Path, help="keep stages here, to go on after a stop")
    parser.add_argument("--settings", nargs="*", default=[], metavar="NAME=VALUE")
    arguments = parser.parse_args()
    data = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    if not data.is_dir():
        print(f"skipped: no data at {data}")
        return
    changed = dict(item.split("=") for item in arguments.settings)
    kinds = {name: type(value) for name, value in vars(Settings()).items()}
    settings = {
        name: bool(int(value)) if kinds[name] is bool else kinds[name](value) for name, value in changed.items()
    }
    images = read(data / "stpt_native_50x40x40um.nii.gz")
    truth = read_label_volume(data / "coarse_native_50x40x40um.nii.gz", like=images)
    labelled = tuple(range(0, LAST_LABELLED + 1, arguments.every))
    known = np.zeros_like(truth.labels)
    known[list(labelled)] = truth.labels[list(labelled)]
    annotations = SectionLabels(LabelMap(known, truth.space), labelled)
    sections = [z for z in range(labelled[-1]) if z not in labelled]
    folder = Path(arguments.store or tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    rows: dict[str, dict[str, object]] = {}
    accuracy: dict[str, list[float]] = {}

    def record(name: str, labels: LabelMap, **more: object) -> None:
        score = score_stack(labels, truth, sections, WITHIN_MM)
        accuracy[name] = [score.accuracy[z] for z in sections]
        rows[name] = {
            "median_accuracy": score.median_accuracy,
            "minimum_accuracy": score.minimum_accuracy,
            "mean_dice": score.mean_dice,
            **more,
        }
        print(
            name, json.dumps({k: round(v, 4) if isinstance(v, float) else v for k, v in rows[name].items()}), flush=True
        )

    began = time.perf_counter()
    record("interpolation", interpolated(annotations, sections), seconds=time.perf_counter() - began)
    for method in arguments.methods.split(","):
        began = time.perf_counter()
        chosen = Settings(**{**settings, "method": method})
        done = complete(images, annotations, chosen, device=arguments.device, store=Store(folder))
        error = calibration_error(done.uncertainty, done.labels.labels, truth.labels, sections)
        record(
            method,
            done.labels,
            seconds=time.perf_counter() - began,
            stages=dict(done.seconds),
            calibration=dict(done.calibration),
            calibration_error=error,
            area_coverage=area_coverage(done, truth.labels, sections),
            iterations=float(np.mean([r.iterations for r in done.sections.values()])),
            objective_falls=sum(bool((np.diff(r.objective) < 0).any()) for r in done.sections.values()),
            peak_memory_gb=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        )
    names = list(accuracy)
    tests = {
        f"{a} - {b}": {
            "median_difference": float(np.median(np.subtract(accuracy[a], accuracy[b]))),
            "p": float(wilcoxon(accuracy[a], accuracy[b]).pvalue) if accuracy[a] != accuracy[b] else 1.0,
        }
        for i, a in enumerate(names)
        for b in names[i + 1 :]
    }
    for pair, test in tests.items():
        print(pair, test)
    result = {
        "every": arguments.every,
        "sections": len(sections),
        "settings": settings,
        "rows": rows,
        "wilcoxon": tests,
        "accuracy": accuracy,
        "versions": package_versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
