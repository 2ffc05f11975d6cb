"""Labelling the sections that Limner suggests, beside evenly spaced and random ones, on the mouse stack.

    python benchmarks/stack_suggest.py [--start 40] [--at-once 2] [--seeds 5] [--shrink 2]
        [--store FOLDER] [--out benchmarks/results/stack_suggest.json]

Sections 0 to 240, coarse labels, method fusion. Every START-th section is labelled to begin with; sections are added
until there are as many as every START/2-th, and scored half-way there too. The score is of the whole stack: all
241 sections, labelled ones right.

- suggested: AT_ONCE sections are labelled, those that Limner suggests, and so on. The truth of no other section is
  looked at.
- widest gap: halves the widest gap, again and again; gaps of one width are taken in random order.
- even, afresh: as many sections evenly spaced from 0 to 240, as if none had been labelled yet: no choice that a user
  has who labelled every START-th already.
- random: added to those labelled to begin with.

Which label fusion gives a pixel depends on the labelled sections nearest to it alone, so the rivals share what is
computed once for a section and its atlases. Reads LIMNER_DATA (default ../shared/data). The labels are
registration-derived: they compare choices and prove nothing about anatomy.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from limner.annotations import SectionLabels
from limner.fusion_stages import changes
from limner.io import read, read_label_volume
from limner.metrics.pixels import score_stack
from limner.registration.section_warps import SectionWarps, register_sections
from limner.registration.velocity_field import Options
from limner.run_record import Store, content_key, machine, package_versions, stored
from limner.section_choice import suggest_sections, weighed_by_change
from limner.section_fusion import FusionOptions, SectionFusion
from limner.space import Space
from limner.volume import LabelMap, Volume

LAST = 240
WITHIN_MM = 0.2
Scores = dict[str, float]


class Fused:
    """Label maps that fusion makes of labelled sections, each section made once for the atlases it rests on."""

    def __init__(self, images: Volume, truth: LabelMap, store: Store) -> None:
        self.truth = truth
        self.known: dict[tuple[int, ...], np.ndarray] = {}
        # no label hangs on rho
        every = SectionLabels(truth, tuple(range(LAST + 1)))
        self.fusion = SectionFusion.of_stack(images, every, FusionOptions(rho=10.0), "cpu")
        pairs = [(z + 1, z) for z in range(LAST)]
        warps = stored(
            store,
            "benchmark-registration",
            content_key(self.fusion.images, self.fusion.spacing, asdict(Options()), pairs),
            lambda: register_sections(self.fusion.images, pairs, self.fusion.spacing).to_arrays(),
        )
        self.fusion.warps = SectionWarps.from_arrays(warps)

    def labels(self, labelled: Sequence[int]) -> LabelMap:
        """The whole stack; labelled sections as they are, and no others looked at."""
        fusion = replace(self.fusion, labelled=tuple(labelled))
        found = self.truth.labels.copy()
        for z in sorted(set(range(LAST + 1)) - set(labelled)):
            key = (z, *(a for a, _ in fusion.atlases(z)))
            if key not in self.known:
                structures = np.asarray(fusion.structures(z))
                self.known[key] = structures[fusion.evidence(z).argmax(dim=0).numpy()].astype(found.dtype)
            found[z] = self.known[key]
        return LabelMap(found, self.truth.space)


def scores_of(predicted: LabelMap, truth: LabelMap, sections: Sequence[int]) -> Scores:
    """Accuracy over sections (mean, median, minimum), mean Dice, and wrong pixels in thousands."""
    score = score_stack(predicted, truth, sections, WITHIN_MM)
    wrong = np.count_nonzero(predicted.labels[list(sections)] != truth.labels[list(sections)])
    return {
        "mean": float(np.mean(list(score.accuracy.values()))),
        "median": score.median_accuracy,
        "minimum": score.minimum_accuracy,
        "dice": score.mean_dice,
        "wrong_thousands": wrong / 1e3,
    }


def widest_gaps(labelled: Sequence[int], n: int, seed: int) -> list[int]:
    """Labelled sections after halving the widest gap until there are `n`; the seed chooses among equal gaps."""
    generator, known = np.random.default_rng(seed), sorted(labelled)
    while len(known) < n:
        gaps = np.diff(known)
        at = int(generator.choice(np.flatnonzero(gaps == gaps.max())))
        known = sorted([*known, (known[at] + known[at + 1]) // 2])
    return known


def random_sections(labelled: Sequence[int], n: int, seed: int) -> list[int]:
    """Labelled sections with random others, `n` in all."""
    others = sorted(set(range(LAST + 1)) - set(labelled))
    added = np.random.default_rng(seed).choice(others, n - len(labelled), replace=False)
    return sorted([*labelled, *added.tolist()])


def suggested(fused: Fused, labelled: Sequence[int], n: int, at_once: int) -> list[int]:
    """Labelled sections after labelling what is suggested, `at_once` at a time, until there are `n`.

    As `complete` suggests: between labelled sections that hangs on how much changes in each gap alone.
    """
    known, positions = sorted(labelled), fused.truth.space.section_positions
    while len(known) < n:
        fusion = replace(fused.fusion, labelled=tuple(known))
        in_gaps = np.ones(LAST + 1)  # their sum is a factor of every section's share
        wrong = weighed_by_change(in_gaps / 1e3, positions, changes(fusion))
        chosen = suggest_sections(wrong, positions, known, min(at_once, n - len(known)))
        known = sorted([*known, *(suggestion.section for suggestion in chosen)])
    return known


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_suggest.json"))
    parser.add_argument("--start", type=int, default=40)
    parser.add_argument("--at-once", type=int, default=2, choices=(1, 2, 3))
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--shrink", type=int, default=2, help="take every so many-th pixel along y and x")
    parser.add_argument("--store", type=Path, help="keep stages here; the registration serves every run")
    arguments = parser.parse_args()
    data = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    if not data.is_dir():
        print(f"skipped: no data at {data}")
        return
    whole = read(data / "stpt_native_50x40x40um.nii.gz")
    of_all = read_label_volume(data / "coarse_native_50x40x40um.nii.gz", like=whole)
    step = arguments.shrink
    kept = slice(0, LAST + 1), slice(None, None, step), slice(None, None, step)
    labels, (z, y, x) = np.ascontiguousarray(of_all.labels[kept]), whole.space.spacing
    space = Space(labels.shape, (z, y * step, x * step))
    images, truth = Volume(np.ascontiguousarray(whole.pixels[kept]), space), LabelMap(labels, space, of_all.table)
    store = Store(Path(arguments.store or tempfile.mkdtemp()))
    start = list(range(0, LAST + 1, arguments.start))
    finish = len(range(0, LAST + 1, arguments.start // 2))
    counts = [(len(start) + finish) // 2, finish]
    began = time.perf_counter()
    fused = Fused(images, truth, store)
    seeds = range(arguments.seeds)
    strategies: dict[str, Callable[[int], list[list[int]]]] = {
        "suggested": lambda n: [suggested(fused, start, n, arguments.at_once)],
        "widest gap": lambda n: [widest_gaps(start, n, seed) for seed in (seeds if n < finish else [0])],
        "even, afresh": lambda n: [np.linspace(0, LAST, n).round().astype(int).tolist()],
        "random": lambda n: [random_sections(start, n, seed) for seed in seeds],
    }
    choices = {n: {name: choose(n) for name, choose in strategies.items()} for n in counts}
    # sections that nobody labelled, so that no strategy is scored on what it was given
    ever = {z for of_n in choices.values() for sets in of_n.values() for labelled in sets for z in labelled}
    never = [z for z in range(LAST + 1) if z not in ever]
    rows = []
    for n, of_n in {len(start): {"to begin with": [start]}, **choices}.items():
        for name, sets in of_n.items():
            for labelled in sets:
                found = fused.labels(labelled)
                everywhere = scores_of(found, truth, range(LAST + 1))
                row = {"n": n, "choice": name, "labelled": labelled, **everywhere}
                rows.append({**row, "never_labelled": scores_of(found, truth, never)})
            print_row(n, name, [row for row in rows if (row["n"], row["choice"]) == (n, name)])
    result = {
        "start": arguments.start,
        "at_once": arguments.at_once,
        "shrink": step,
        "never_labelled": never,
        "rows": rows,
        "seconds": time.perf_counter() - began,
        "versions": package_versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1))


def print_row(n: int, choice: str, rows: Sequence[dict]) -> None:
    """Mean over the sets of sections, with the range of the mean accuracy where there are several."""
    names = ("mean", "median", "minimum", "dice", "wrong_thousands")
    mean = {name: np.mean([row[name] for row in rows]) for name in names}
    lowest, highest = min(row["mean"] for row in rows), max(row["mean"] for row in rows)
    spread = f" ({lowest:.4f} to {highest:.4f})" if len(rows) > 1 else ""
    never = np.mean([row["never_labelled"]["mean"] for row in rows])
    print(
        f"{n:3} {choice:14} mean {mean['mean']:.4f}{spread} median {mean['median']:.4f} minimum {mean['minimum']:.3f} "
        f"Dice {mean['dice']:.4f} wrong {mean['wrong_thousands']:.0f}k; never labelled: mean {never:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
