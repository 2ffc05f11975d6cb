"""After labels are corrected: network and scales kept from the run before, beside fitted anew.

    python benchmarks/stack_corrections.py [--steps 400] [--method gem] [--taken-over]

Coarse labels of the mouse stack, every 10th section labelled from 0 to 250, withheld sections scored within 0.2 mm of
their structures. First as many of the labelled sections as a fit stands (`fusion_stages.MAY_CHANGE`) are not labelled,
or, `--taken-over`, hold what fusion makes of the others, as if a user had taken that for labels; then they are
labelled. `kept` goes on in the store of the first run, `anew` begins with none. Each call adds its part to the results.
Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from limner.annotations import SectionLabels
from limner.completion import Completion
from limner.fusion_stages import MAY_CHANGE
from limner.methods.stack_completion import complete
from limner.metrics.pixels import score_stack
from limner.run_record import Store, machine, package_versions, write_atomically
from limner.stack_settings import ALGORITHM, Settings
from limner.volume import LabelMap, Volume
from stack_completion import Case, mouse_stack
from stack_methods import WITHIN_MM, area_coverage, calibration_error

EVERY = 10


def first_labels(case: Case, changed: list[int], taken_over: bool) -> SectionLabels:
    """The labels without some sections, or with these as the others make them, by fusion."""
    given = case.annotations
    others = tuple(z for z in given.labelled if z not in changed)
    known = np.zeros_like(given.label_map.labels)
    known[list(others)] = given.label_map.labels[list(others)]
    of_others = SectionLabels(LabelMap(known, given.label_map.space), others)
    if not taken_over:
        return of_others
    made = complete(case.images, of_others, Settings(method="fusion"), device="cpu", jobs=1).labels.labels
    labels = given.label_map.labels.copy()
    labels[changed] = made[changed]
    return SectionLabels(LabelMap(labels, given.label_map.space), given.labelled)


def scored(done: Completion, case: Case, seconds: float) -> dict[str, Any]:
    """What the result is worth on withheld sections, and what was fitted."""
    sections = case.sections("everywhere")
    score = score_stack(done.labels, case.truth, sections, WITHIN_MM)
    accuracy = [score.accuracy[z] for z in sections]
    held, width = area_coverage(done, case.truth.labels, sections)
    return {
        "median_accuracy": score.median_accuracy,
        "minimum_accuracy": score.minimum_accuracy,
        "mean_accuracy": float(np.mean(accuracy)),
        "mean_dice": score.mean_dice,
        "calibration_error": calibration_error(done.uncertainty, done.labels.labels, case.truth.labels, sections),
        "intervals_hold": held,
        "intervals_width": width,
        "calibration": done.calibration,
        "cpu_seconds": seconds,
        "notes": list(done.notes),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--method", default="gem")
    parser.add_argument("--steps", type=int, default=400, help="of training")
    parser.add_argument("--taken-over", action="store_true")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_corrections.json"))
    given = parser.parse_args()
    stack = mouse_stack()
    if stack is None:
        return
    case = Case(*stack, every=EVERY, displaced=False)
    labelled = case.annotations.labelled
    changed = list(labelled[2 : -2 : round(1 / MAY_CHANGE)])
    while len(changed) > MAY_CHANGE * (len(labelled) - (0 if given.taken_over else len(changed))):
        changed.pop()  # of what is labelled in the first run so many may change
    settings = Settings(method=given.method, training_steps=given.steps)
    first = first_labels(case, changed, given.taken_over)
    rows: dict[str, Any] = {}

    def run(name: str, images: Volume, labels: SectionLabels, store: Path) -> None:
        began = time.process_time()
        done = complete(images, labels, settings, device="cpu", jobs=1, store=Store(store))
        rows[name] = scored(done, case, time.process_time() - began)
        print(name, json.dumps(rows[name]), flush=True)
        if name == "kept" and not any(note.startswith("Labels changed") for note in done.notes):
            print("kept: it was not, all was fitted anew", flush=True)

    with tempfile.TemporaryDirectory() as kept, tempfile.TemporaryDirectory() as new:
        run("before", case.images, first, Path(kept))
        run("kept", case.images, case.annotations, Path(kept))
        run("anew", case.images, case.annotations, Path(new))
    result = {
        "rows": rows,
        "changed": changed,
        "labelled": len(labelled),
        "settings": vars(settings),
        "algorithm": ALGORITHM,
        "versions": package_versions(),
        "machine": machine(),
    }
    part = f"{given.method}, {'taken over' if given.taken_over else 'added'}"
    earlier = json.loads(given.out.read_text()) if given.out.exists() else {}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(earlier | {part: result}, indent=1) + "\n"
    write_atomically(given.out, lambda handle: handle.write(text.encode()))


if __name__ == "__main__":
    main()
