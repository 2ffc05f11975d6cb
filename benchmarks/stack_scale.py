"""What a section costs with few and with hundreds of structures: seconds, memory and scores of label fusion.

    python benchmarks/stack_scale.py [--cases coarse fine ccfv3] [--sections 60] [--out FILE]

Every 10th section is labelled. The mouse stack (50 x 40 x 40 um) with 15 coarse groups and with all fine structures,
registered once, completed with ``--method fusion``; and the fine structures of the Allen atlas at 25 um, of which there
are labels only: no images, so that nothing is registered. Each case runs in a process of its own, on one core, so that
its peak memory is its own. `--sections` takes that many from the middle of each stack. Seconds are those of the
processor, which other work on the machine lengthens little.
Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from limner.annotations import SectionLabels
from limner.io import read, read_label_volume
from limner.methods.stack_completion import complete
from limner.metrics.pixels import score_stack
from limner.run_record import machine, package_versions
from limner.space import Space
from limner.stack_settings import Settings
from limner.volume import LabelMap, Volume

EVERY = 10
WITHIN_MM = 0.2
DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))


@dataclass(frozen=True)
class Case:
    """Labels, and images where there are any."""

    labels: Path
    images: Path | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "labels", DATA / self.labels)
        if self.images is not None:
            object.__setattr__(self, "images", DATA / self.images)


STACK = Path("stack_stpt_mouse")
CASES = {
    "coarse": Case(STACK / "coarse_native_50x40x40um.nii.gz", STACK / "stpt_native_50x40x40um.nii.gz"),
    "fine": Case(STACK / "labels_native_50x40x40um.nii.gz", STACK / "stpt_native_50x40x40um.nii.gz"),
    "ccfv3": Case(Path("labels_ccfv3_mouse/ccfv3_2017_labels_25um.nii.gz")),
}


def stack_of(case: Case, sections: int) -> tuple[Volume, LabelMap]:
    """Images (blank where there are none) and labels of the middle `sections`; 0: of all."""
    images = None if case.images is None else read(case.images)
    truth = read_label_volume(case.labels, like=images)
    whole = truth.space
    count = min(sections or whole.shape[0], whole.shape[0])
    middle = slice((whole.shape[0] - count) // 2, (whole.shape[0] + count) // 2)
    space = Space(shape=(count, *whole.shape[1:]), spacing=whole.spacing)
    pixels = np.zeros(space.shape, np.uint8) if images is None else images.pixels[middle].copy()
    return Volume(pixels, space), LabelMap(truth.labels[middle].copy(), space)


def peak_gb() -> float:
    """Most memory that this process ever held."""
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1e6


def processor_seconds(reports: list[tuple[str, float]], stage: str) -> float:
    """Of the sections but the first: between the reports that one is done."""
    times = [seconds for name, seconds in reports if name == stage]
    return (times[-1] - times[0]) / (len(times) - 1)


def measure(name: str, sections: int) -> dict[str, object]:
    """One row of the table."""
    torch.set_num_threads(1)
    case = CASES[name]
    images, truth = stack_of(case, sections)
    labelled = tuple(range(0, truth.space.shape[0], EVERY))
    known = np.zeros_like(truth.labels)
    known[list(labelled)] = truth.labels[list(labelled)]
    settings = Settings(method="fusion", registration="chained" if case.images is not None else "none")
    reports: list[tuple[str, float]] = []
    loaded = peak_gb()
    began, wall = time.process_time(), time.perf_counter()
    done = complete(
        images,
        SectionLabels(LabelMap(known, truth.space), labelled),
        settings,
        device="cpu",
        jobs=1,
        progress=lambda stage, *_: reports.append((stage, time.process_time())),
    )
    possible = [len(result.structures) for result in done.sections.values()]
    scored = [z for z in sorted(done.sections) if z < labelled[-1]]
    score = score_stack(done.labels, truth, scored, WITHIN_MM)
    return {
        "case": name,
        "sections": list(truth.space.shape),
        "structures": len(np.unique(truth.labels)),
        "structures_of_a_section": {"median": float(np.median(possible)), "most": max(possible)},
        "completed": len(done.sections),
        "cpu_seconds_a_section": processor_seconds(reports, "sections"),
        "cpu_seconds_in_all": time.process_time() - began,
        "wall_seconds_in_all": time.perf_counter() - wall,
        "stages_wall_seconds": dict(done.seconds),
        "peak_gb": peak_gb(),
        "peak_gb_before": loaded,
        "median_accuracy": score.median_accuracy,
        "minimum_accuracy": score.minimum_accuracy,
        "mean_dice": score.mean_dice,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_scale.json"))
    parser.add_argument("--cases", nargs="*", choices=list(CASES), default=list(CASES))
    parser.add_argument("--sections", type=int, default=0, help="of the middle of each stack; 0: all")
    parser.add_argument("--one", choices=list(CASES), help="one case in this process, its row as JSON on the last line")
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(measure(arguments.one, arguments.sections)))
        return
    rows = []
    for name in arguments.cases:
        if not CASES[name].labels.is_file():
            print(f"skipped: no data at {CASES[name].labels}")
            continue
        asked = ["--one", name, "--sections", str(arguments.sections)]
        alone = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "NUMBA_NUM_THREADS": "1"}
        run = subprocess.run([sys.executable, __file__, *asked], env=alone, capture_output=True, text=True, check=False)
        if run.returncode:
            sys.exit(run.stderr)
        rows.append(json.loads(run.stdout.splitlines()[-1]))
        print(json.dumps(rows[-1]), flush=True)
        result = {"every": EVERY, "rows": rows}
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        arguments.out.write_text(
            json.dumps({**result, "versions": package_versions(), "machine": machine()}, indent=1) + "\n"
        )


if __name__ == "__main__":
    main()
