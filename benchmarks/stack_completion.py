"""Limner beside what a user would otherwise pick to complete a stack, on the mouse stack; one process at a time.

    make bench-stack                                          every 10th and every 20th section labelled
    python benchmarks/stack_completion.py --every 5 10 20 40 [--displaced] [--only GROUP ...] [--show]

Coarse labels, every n-th section labelled from 0 to the last that fits below 250, the others scored within 0.2 mm of
their structures. The labels are registration-derived and smooth along z: they compare methods, favour interpolation,
and prove nothing about anatomy. Peers live in .venv-peers (make bench-peers; stack_peers.py holds them). Each row is
made in a process of its own, on one thread, and every section is stored in bench-out/ as soon as it is made: a run that
was stopped goes on. Tables are made from all that is stored, and so are docs/stack_completion.svg and
benchmarks/results/stack_completion.json, which keep rows that are not stored as they were; --show does no more than
that.

- ANTs joint label fusion is made for every fourth section (the odd multiples of 2), Biomedisa on a piece of the first
  two gaps after section 100; other rows are also scored there, for comparison.
- The three fusions after SyN-CC share their registrations; the seconds of each are those of all three.
- `--displaced`: each section is rotated up to 10 degrees, shifted up to 10 % of the width along y and x, and made up to
  20 % brighter or darker (seed 0), labels with it, on a canvas that loses nothing. Interpolation knows nothing of that.
- Intervals of 95 %: label gaps drawn with replacement, 1,000 times.

Memory is the most that the process held. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import matplotlib as mpl
import numpy as np
from scipy import ndimage

from limner.annotations import SectionLabels
from limner.intensity import background_level, to_8_bit
from limner.io import read, read_label_volume
from limner.methods.stack_completion import complete
from limner.metrics.pixels import confusion, evaluation_mask
from limner.run_record import Store, machine, package_versions, write_atomically
from limner.space import Space
from limner.stack_settings import ALGORITHM, Settings
from limner.volume import LabelMap, Volume
from stack_methods import LAST_LABELLED, WITHIN_MM, interpolated
from stack_peers import PIECE, STACK_PEERS, UNET_CPU_SECONDS, peak_mb, write

ROOT = Path(__file__).resolve().parent.parent
ONE_THREAD = dict.fromkeys(
    (
        *(f"{name}_NUM_THREADS" for name in ("OMP", "MKL", "OPENBLAS", "NUMBA")),
        *("ITK_GLOBAL_DEFAULT_NUMBER_OF_THREADS", "POCL_MAX_PTHREAD_COUNT"),
    ),
    "1",
)
PACKAGES = ("antspyx", "itk", "itk-morphologicalcontourinterpolation", "torch", "biomedisa", "numpy", "scipy")
RESAMPLED, LEVEL = 1000, 95
EVERYS = (5, 10, 20, 40)  # reported where something is stored of them
MAX_ANGLE, MAX_SHIFT, BRIGHTNESS, DISPLACED_SEED = 10.0, 0.1, 0.2, 0  # degrees, of the width, of the grey level
EVERY_FOURTH, PIECE_FROM, PIECE_GAPS = 4, 100, 2
Result = dict[str, Any]


@dataclass(frozen=True)
class Row:
    """A line of the table.

    Parameters
    ----------
    group : str
        The process that makes it.
    title : str
        What it is.
    part : str
        Which of the label maps that the process leaves.
    where : {'everywhere', 'fourth', 'piece'}
        Which sections it is made for.
    """

    group: str
    title: str
    part: str = "labels"
    where: str = "everywhere"


ROWS = (
    Row("nearest", "copy of the nearest labelled section"),
    Row("linear", "linear interpolation of signed distances"),
    Row("morphological", "ITK morphological contour interpolation, background and ends too"),
    Row("affine", "affine alignment, then linear interpolation"),
    Row("unet", "plain 2D U-Net"),
    Row("syncc", "SyN-CC, fusion as printed", "printed"),
    Row("syncc", "SyN-CC, odds normalised in each atlas", "normalised"),
    Row("syncc", "SyN-CC, signed distances blended", "blended"),
    Row("joint_label_fusion", "SyN-CC, ANTs joint label fusion", where="fourth"),
    Row("biomedisa", "Biomedisa smart interpolation", where="piece"),
    Row("fusion", "Limner, fusion"),
    Row("network", "Limner, network"),
    Row("product", "Limner, product"),
    Row("gem", "Limner, gem"),
)
# what is quick comes first; the parts of gem are made when they are asked for
ORDER = (
    *("nearest", "linear", "fusion", "affine", "morphological", "unet"),
    *("joint_label_fusion", "biomedisa", "syncc", "gem", "network", "product"),
)
OPTIONAL = ("network", "product")
TITLES = {
    "everywhere": "all sections",
    "fourth": "every fourth section",
    "piece": f"{PIECE_GAPS} gaps from section {PIECE_FROM} on, rows {PIECE[0].start} to {PIECE[0].stop - 1}, "
    f"columns {PIECE[1].start} to {PIECE[1].stop - 1}",
}


# ---- the stack ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Case:
    """A stack of which every n-th section is labelled.

    Parameters
    ----------
    images, truth : Volume, LabelMap
        The whole stack.
    every : int
        Distance between labelled sections.
    displaced : bool
        Whether each section was displaced.
    """

    images: Volume
    truth: LabelMap
    every: int
    displaced: bool

    @property
    def name(self) -> str:
        return f"every{self.every}" + "-displaced" * self.displaced

    @property
    def annotations(self) -> SectionLabels:
        labelled = tuple(range(0, LAST_LABELLED + 1, self.every))
        known = np.zeros_like(self.truth.labels)
        known[list(labelled)] = self.truth.labels[list(labelled)]
        return SectionLabels(LabelMap(known, self.truth.space), labelled)

    def sections(self, where: str) -> list[int]:
        """Unlabelled sections between labelled ones: all, every fourth, or those of the piece."""
        last = max(range(0, LAST_LABELLED + 1, self.every))
        between = [z for z in range(last) if z % self.every]
        if where == "fourth":
            return [z for z in between if z % EVERY_FOURTH == EVERY_FOURTH // 2]
        first, end = (-(-PIECE_FROM // self.every) + i for i in (0, PIECE_GAPS))
        return [z for z in between if first <= z / self.every <= end] if where == "piece" else between

    def write_input(self, folder: Path, where: str) -> None:
        """in.npz as stack_peers.py reads it: labels of labelled sections alone; for the piece it names those there."""
        given = self.annotations
        labels, labelled = given.label_map.labels, np.asarray(given.labelled)
        if where == "piece":
            sections = self.sections(where)
            labelled = labelled[(labelled >= min(sections) - 1) & (labelled <= max(sections) + 1)]
        folder.mkdir(parents=True, exist_ok=True)
        arrays = {"levels": to_8_bit(self.images.pixels), "labels": labels, "labelled": labelled}
        write(folder / "in.npz", {**arrays, "spacing": np.asarray(self.truth.space.spacing)})


def mouse_stack() -> tuple[Volume, LabelMap] | None:
    """The stack and its coarse labels, or None with a message where the data are not there."""
    data = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    if not data.is_dir():
        print(f"skipped: no data at {data}")
        return None
    images = read(data / "stpt_native_50x40x40um.nii.gz")
    return images, read_label_volume(data / "coarse_native_50x40x40um.nii.gz", like=images)


def displace(images: Volume, truth: LabelMap, seed: int = DISPLACED_SEED) -> tuple[Volume, LabelMap]:
    """Each section turned, shifted, and made brighter or darker; labels turn and shift with it.

    The canvas grows until every structure and `WITHIN_MM` around it stay inside; what is new is background. Images are
    sampled linearly, labels at the nearest pixel.
    """
    n, height, width = truth.labels.shape
    draw = np.random.default_rng(seed)
    angles = np.radians(draw.uniform(-MAX_ANGLE, MAX_ANGLE, n))
    spacing = np.asarray(truth.space.spacing[1:])
    shifts = draw.uniform(-MAX_SHIFT, MAX_SHIFT, (n, 2)) * width * spacing[1]  # mm
    factors = draw.uniform(1 - BRIGHTNESS, 1 + BRIGHTNESS, n)
    turns = np.array([[np.cos(angles), -np.sin(angles)], [np.sin(angles), np.cos(angles)]]).transpose(2, 0, 1)
    centre = (np.array([height, width]) - 1) / 2
    reach = np.zeros(2)
    for labels, turn, shift in zip(truth.labels, turns, shifts, strict=True):
        found = np.argwhere(labels > 0)
        if len(found):
            at = ((found - centre) * spacing) @ turn.T + shift  # mm from the centre
            reach = np.maximum(reach, (np.abs(at).max(axis=0) + WITHIN_MM) / spacing)
    margin = np.maximum(np.ceil(reach - centre), 0).astype(int)  # pixels on each side
    shape = (height + 2 * margin[0], width + 2 * margin[1])
    new_centre = centre + margin
    pixels, labels = np.zeros((n, *shape), np.float32), np.zeros((n, *shape), truth.labels.dtype)
    outside = float(background_level(images.pixels[..., None])[0])
    for z in range(n):
        # a pixel p of the new section shows centre + T^-1 (p - new centre - shift), all in pixels of its own size
        inverse = turns[z].T * spacing[None, :] / spacing[:, None]
        offset = centre - inverse @ (new_centre + shifts[z] / spacing)
        pixels[z] = factors[z] * ndimage.affine_transform(
            images.pixels[z].astype(np.float32), inverse, offset, shape, order=1, cval=outside
        )
        labels[z] = ndimage.affine_transform(truth.labels[z], inverse, offset, shape, order=0)
    space = Space(shape=(n, *shape), spacing=truth.space.spacing)
    return Volume(pixels, space), LabelMap(labels, space)


# ---- making rows ----------------------------------------------------------------------------------------------------


class Clock:
    """Seconds of a run, over its stops.

    Parameters
    ----------
    path : Path
        Of the file that is written at every tick.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.before = json.loads(path.read_text()) if path.exists() else {"seconds": 0.0, "cpu_seconds": 0.0}
        self.began = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}

    def tick(self, *_: object) -> None:
        now = {"seconds": time.perf_counter(), "cpu_seconds": time.process_time()}
        cost = {name: self.before[name] + now[name] - self.began[name] for name in now}
        peak = max(self.before.get("peak_mb", 0.0), peak_mb())
        text = json.dumps(cost | {"peak_mb": peak, "algorithm": ALGORITHM})
        write_atomically(self.path, lambda handle: handle.write(text.encode()))


def nearest(case: Case) -> np.ndarray:
    labelled = np.asarray(case.annotations.labelled)
    closest = [labelled[np.abs(labelled - z).argmin()] for z in range(len(case.truth.labels))]
    return case.truth.labels[closest]


def by_limner(case: Case, group: str, folder: Path) -> None:
    """Make a row of Limner's, or one that needs no peer; its cost is in prepared.json, as of a peer."""
    out = folder / group
    out.mkdir(parents=True, exist_ok=True)
    sections = case.sections("everywhere")
    clock = Clock(out / "prepared.json")
    if group == "nearest":
        labels = nearest(case)
    elif group == "linear":
        labels = interpolated(case.annotations, sections).labels
    else:
        # sections that lie each differently: the network is trained on larger displacements
        settings = Settings(method=group, placement=1.0 if case.displaced else Settings().placement)
        (out / "stages").mkdir(exist_ok=True)
        kept = {"jobs": 1, "store": Store(out / "stages"), "progress": clock.tick}
        labels = complete(case.images, case.annotations, settings, device="cpu", **kept).labels.labels
    clock.tick()
    for z in sections:
        write(out / f"{z:04}.npz", {"labels": labels[z].astype(np.uint16)})


def made(folder: Path, group: str, sections: Sequence[int]) -> bool:
    return all((folder / group / f"{z:04}.npz").exists() for z in sections)


def run_peer(python: Path, peer: str, folder: Path, items: Sequence[int]) -> None:
    """Run a peer in its own environment on what it has not made yet."""
    script = Path(__file__).with_name("stack_peers.py")
    subprocess.run([python, script, peer, folder, *map(str, items)], check=True, env={**os.environ, **ONE_THREAD})


def make(case: Case, row: Row, folder: Path, python: Path) -> None:
    """Make what is missing of a row; a peer that fails is reported and left out."""
    sections = case.sections(row.where)
    if made(folder, row.group, sections):
        return
    print(f"{case.name}: {row.group}", flush=True)
    if row.group not in STACK_PEERS:
        command = [sys.executable, __file__, "--child", row.group, "--every", str(case.every), "--store", folder.parent]
        flag = ["--displaced"] if case.displaced else []
        subprocess.run([*command, *flag], check=True, env={**os.environ, **ONE_THREAD})
        return
    # the piece has labels of its own: a folder of its own
    where = folder / "piece" if row.where == "piece" else folder
    if not (where / "in.npz").exists():
        case.write_input(where, row.where)
    try:
        run_peer(python, row.group, where, sections)
    except (subprocess.CalledProcessError, FileNotFoundError) as error:
        print(f"{case.name}: {row.group} failed ({error}); make bench-peers builds its environment", flush=True)


# ---- scoring --------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Counts:
    """Pixels of one section that count, so that any choice of sections can be scored.

    Parameters
    ----------
    right, n : int
        Pixels that are right, and all.
    both, sizes : ndarray of int
        For each label from 0: pixels that are it in truth and prediction, and in truth plus in prediction; shape (L,).
    """

    right: int
    n: int
    both: np.ndarray
    sizes: np.ndarray


def count(predicted: np.ndarray, truth: np.ndarray, mask: np.ndarray, n_labels: int) -> Counts:
    """Compare one section, inside a mask."""
    labels, table = confusion(predicted, truth, mask)
    both, sizes = np.zeros((2, n_labels), int)
    both[labels] = np.diag(table)
    sizes[labels] = table.sum(axis=0) + table.sum(axis=1)
    return Counts(int(np.trace(table)), int(mask.sum()), both, sizes)


def pooled_dice(both: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """Mean over structures of the Dice of pixels added up over sections: from (..., L) to (...)."""
    there = sizes[..., 1:] > 0
    dice = np.where(there, 2 * both[..., 1:] / np.maximum(sizes[..., 1:], 1), 0)
    return dice.sum(axis=-1) / there.sum(axis=-1)


def resampled(counts: Sequence[Counts], gaps: Sequence[int], seed: int = 0) -> dict[str, np.ndarray]:
    """Median accuracy and mean Dice with label gaps drawn with replacement, `RESAMPLED` times.

    The draws depend on the gaps and the seed alone, so that rows of the same sections may be compared draw by draw.
    """
    accuracy = np.array([c.right / c.n for c in counts])
    names, of = np.unique(gaps, return_inverse=True)
    both, sizes = (
        np.stack([sum(getattr(c, kind) for c, g in zip(counts, of, strict=True) if g == i) for i in range(len(names))])
        for kind in ("both", "sizes")
    )
    drawn = np.random.default_rng(seed).integers(len(names), size=(RESAMPLED, len(names)))
    medians = [np.median(np.concatenate([accuracy[of == g] for g in chosen])) for chosen in drawn]
    dice = [pooled_dice(both[chosen].sum(axis=0), sizes[chosen].sum(axis=0)) for chosen in drawn]
    return {"median_accuracy": np.asarray(medians), "mean_dice": np.asarray(dice)}


def interval(draws: np.ndarray) -> list[float]:
    return np.percentile(draws, [50 - LEVEL / 2, 50 + LEVEL / 2]).tolist()


class Scorer:
    """Scores what is stored of a case.

    Parameters
    ----------
    case : Case
    folder : Path
        Where its sections are stored.
    """

    def __init__(self, case: Case, folder: Path) -> None:
        self.case, self.folder = case, folder
        self.n_labels = int(case.truth.labels.max()) + 1
        self.mask = lru_cache(maxsize=None)(self._mask)

    def _mask(self, z: int) -> np.ndarray:
        return evaluation_mask(self.case.truth.labels[z], self.case.truth.space.spacing[1:], WITHIN_MM)

    def stored(self, row: Row, sections: Sequence[int]) -> list[dict[str, np.ndarray]] | None:
        """What a row left for each section; None where one is missing."""
        folder = self.folder / "piece" if row.where == "piece" else self.folder
        if not made(folder, row.group, sections):
            return None
        loaded = []
        for z in sections:
            with np.load(folder / row.group / f"{z:04}.npz") as file:
                loaded.append({name: file[name] for name in file.files})
        return loaded

    def score(self, row: Row, where: str) -> tuple[Result, list[Counts]] | None:
        """A row's scores on some of the sections, with the counts they are made from."""
        sections = self.case.sections(where)
        found = self.stored(row, sections)
        if found is None or not sections:  # with every second section labelled there is none of every fourth
            return None
        window = PIECE if where == "piece" else (slice(None), slice(None))
        truth = self.case.truth.labels
        counts = {
            z: count(
                kept[row.part].astype(int)[window], truth[z][window].astype(int), self.mask(z)[window], self.n_labels
            )
            for z, kept in zip(sections, found, strict=True)
        }
        counts = {z: c for z, c in counts.items() if c.n}  # a section without structures has no accuracy
        accuracy = {z: c.right / c.n for z, c in counts.items()}
        gaps = [z // self.case.every for z in counts]
        draws = resampled(list(counts.values()), gaps)
        dice = pooled_dice(*(sum(getattr(c, kind) for c in counts.values()) for kind in ("both", "sizes")))
        result = {
            "title": row.title,
            "group": row.group,
            "n_sections": len(sections),
            "median_accuracy": float(np.median(list(accuracy.values()))),
            "minimum_accuracy": min(accuracy.values()),
            "mean_accuracy": float(np.mean(list(accuracy.values()))),
            "mean_dice": float(dice),
            "intervals": {name: interval(values) for name, values in draws.items()},
            "accuracy": {str(z): a for z, a in accuracy.items()},
            "draws": draws,
        }
        return result | (self.cost(row, found) if where == row.where else {}), list(counts.values())

    def cost(self, row: Row, found: list[dict[str, np.ndarray]]) -> Result:
        """Seconds a section, what was prepared for all of them shared out; and the most memory held."""
        folder = self.folder / "piece" if row.where == "piece" else self.folder
        prepared = json.loads((folder / row.group / "prepared.json").read_text())
        cost = {
            f"{name}_a_section": (prepared[name] + sum(float(f.get(name, 0)) for f in found)) / len(found)
            for name in ("seconds", "cpu_seconds")
        }
        made = {name: prepared[name] for name in ("algorithm",) if name in prepared}
        return cost | made | {"peak_mb": max(prepared["peak_mb"], *(float(f.get("peak_mb", 0)) for f in found))}


def scored(case: Case, folder: Path) -> Result:
    """All rows that are complete, on all sections, on every fourth, and on the piece; differences to Limner's gem."""
    scorer, tables = Scorer(case, folder), {}
    for where in TITLES:
        rows = [scorer.score(row, where) for row in ROWS if row.where in ("everywhere", where)]
        results = [found[0] for found in rows if found is not None]
        draws = [result.pop("draws") for result in results]
        ours = next((i for i, result in enumerate(results) if result["group"] == "gem"), None)
        for i, result in enumerate(results):
            if ours is not None and i != ours:
                names = ("median_accuracy", "mean_dice")
                result["gem_ahead"] = {
                    name: [results[ours][name] - result[name], *interval(draws[ours][name] - draws[i][name])]
                    for name in names
                }
        tables[where] = results
    return tables


def table(results: Sequence[Result]) -> str:
    """The rows as Markdown."""

    def number(value: float | None, digits: int) -> str:
        return "" if value is None else f"{value:.{digits}f}"

    def with_interval(result: Result, name: str) -> str:
        low, high = result["intervals"][name]
        return f"{result[name]:.4f} ({low:.3f} to {high:.3f})"

    lines = [
        "| method | median accuracy | minimum | mean | mean Dice | seconds a section | of the processor | peak MB |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for r in results:
        cells = [
            *(r["title"], with_interval(r, "median_accuracy"), number(r["minimum_accuracy"], 4)),
            *(number(r["mean_accuracy"], 4), with_interval(r, "mean_dice"), number(r.get("seconds_a_section"), 2)),
            *(number(r.get("cpu_seconds_a_section"), 2), number(r.get("peak_mb"), 0)),
        ]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def figure(cases: dict[str, Result], spacing_mm: float, path: Path) -> None:
    """Accuracy against distance: the median of each spacing, and the mean by distance to the nearest label."""
    mpl.use("Agg")
    mpl.rcParams["svg.hashsalt"] = "limner"
    from matplotlib import pyplot as plt

    everys = {int(name.split("-")[0].removeprefix("every")): of["everywhere"] for name, of in cases.items()}
    titles = [row.title for row in ROWS if any(r["title"] == row.title for rows in everys.values() for r in rows)]
    widest = max(everys)
    drawing, (left, right) = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for i, title in enumerate(titles):
        style = {"color": f"C{i % 10}", "linestyle": "-" if title.startswith("Limner") else "--", "linewidth": 1.2}
        found = {e: r for e, rows in sorted(everys.items()) for r in rows if r["title"] == title}
        # beside one another, so that intervals can be told apart
        distance = [every * spacing_mm / 2 * 1.02 ** (i - len(titles) / 2) for every in found]
        medians = np.array([r["median_accuracy"] for r in found.values()])
        bounds = np.array([r["intervals"]["median_accuracy"] for r in found.values()]).T
        left.errorbar(distance, medians, np.abs(bounds - medians), label=title, marker="o", markersize=3, **style)
        if widest not in found:
            continue
        by_distance: dict[float, list[float]] = {}
        for z, accuracy in found[widest]["accuracy"].items():
            place = int(z) % widest
            by_distance.setdefault(min(place, widest - place) * spacing_mm, []).append(accuracy)
        right.plot(*zip(*((d, np.mean(a)) for d, a in sorted(by_distance.items())), strict=True), **style)
    ticks = [every * spacing_mm / 2 for every in sorted(everys)]
    left.set(xlabel="mean distance to both labels, mm", ylabel="median accuracy", xscale="log")
    left.set_xticks(ticks, [f"{tick:g}" for tick in ticks], minor=False)
    left.set_xticks([], minor=True)
    left.tick_params(axis="x", rotation=60)
    right.set(xlabel=f"distance to the nearest, mm (every {widest}th labelled)", ylabel="mean accuracy")
    drawing.legend(loc="outside right center", fontsize=7, frameon=False)
    drawing.savefig(path, metadata={"Date": None} if path.suffix == ".svg" else None)


def peer_versions(python: Path) -> dict[str, str]:
    """Versions in the peers' environment."""
    code = (
        "import importlib.metadata as m, json, sys\n"
        f"print(json.dumps({{n: m.version(n) for n in {PACKAGES!r} if any(True for _ in m.distributions(name=n))}}))"
    )
    found = subprocess.run([python, "-c", code], check=True, capture_output=True, text=True).stdout
    return dict(json.loads(found))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, nargs="+", default=[10, 20])
    parser.add_argument("--displaced", action="store_true")
    parser.add_argument("--only", nargs="+", choices=ORDER, help="rows, by what makes them")
    parser.add_argument("--show", action="store_true", help="make nothing; score what is stored")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="their Python")
    parser.add_argument("--store", type=Path, default=Path("bench-out/stack_completion"))
    parser.add_argument("--out", type=Path, help="default: benchmarks/results/stack_completion[_displaced].json")
    parser.add_argument("--figure", type=Path, help="default: docs/stack_completion[_displaced].svg")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    stack = mouse_stack()
    if stack is None:
        return
    images, truth = displace(*stack) if given.displaced else stack
    cases = [Case(images, truth, every, given.displaced) for every in given.every]
    if given.child:
        by_limner(cases[0], given.child, given.store / cases[0].name)
        return
    name = "stack_completion" + "_displaced" * given.displaced
    out = given.out or Path(f"benchmarks/results/{name}.json")
    for group in ORDER if not given.show else ():
        if group in (given.only or [g for g in ORDER if g not in OPTIONAL]):
            row = next(row for row in ROWS if row.group == group)
            for case in cases:
                make(case, row, given.store / case.name, given.peers)
    every_case = [Case(images, truth, every, given.displaced) for every in sorted({*EVERYS, *given.every})]
    spacing = truth.space.spacing[0]
    stored = [case for case in every_case if (given.store / case.name).is_dir()]
    report(stored, given.store, given.peers, out, given.figure or Path(f"docs/{name}.svg"), spacing)


def merged(earlier: dict[str, Result], new: dict[str, Result]) -> dict[str, Result]:
    """The tables of two calls: of each row the newer one, in the order of `ROWS`."""
    order, together = [row.title for row in ROWS], dict(earlier)
    for name, tables in new.items():
        together[name] = {}
        for where in TITLES:
            rows = {row["title"]: row for of in (earlier.get(name, {}), tables) for row in of.get(where, [])}
            together[name][where] = sorted(rows.values(), key=lambda row: order.index(row["title"]))
    return together


def report(cases: list[Case], store: Path, python: Path, out: Path, drawn: Path, spacing_mm: float) -> None:
    """Score what is stored; print the tables, write the numbers and the figure."""
    tables = {case.name: scored(case, store / case.name) for case in cases}
    for name, of_case in tables.items():
        for where, results in of_case.items():
            if results:
                print(f"\n{name}, {TITLES[where]} ({results[0]['n_sections']})\n\n{table(results)}")
    settings = {"within_mm": WITHIN_MM, "resampled": RESAMPLED, "unet_cpu_seconds": UNET_CPU_SECONDS, "threads": 1}
    seeds = {"displaced": DISPLACED_SEED, "resampling": 0, "peers": 1, "limner": Settings().seed}
    versions = package_versions() | {f"peers: {n}": v for n, v in peer_versions(python).items()}
    # rows that are not stored here stay as an earlier call left them; each names who made it
    earlier = json.loads(out.read_text()) if out.exists() else {"cases": {}, "makers": []}
    makers = [*earlier["makers"], {"versions": versions, "machine": machine()}]
    for of_case in tables.values():
        for row in (row for results in of_case.values() for row in results):
            row["maker"] = len(makers) - 1
    tables = merged(earlier["cases"], tables)
    result = {"cases": tables, "makers": makers, "settings": settings, "seeds": seeds}
    out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(out, lambda handle: handle.write((json.dumps(result, indent=1) + "\n").encode()))
    shown = {name: of_case for name, of_case in tables.items() if of_case["everywhere"]}
    if shown:
        figure(shown, spacing_mm, drawn)


if __name__ == "__main__":
    main()
