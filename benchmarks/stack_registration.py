"""Registration of sections alone: Limner's beside ANTs and NiftyReg, on the same pairs of the mouse stack.

    python benchmarks/stack_registration.py [--only METHOD ...] [--show] [--out FILE]

Sections at twelve places, each with those 0.5 and 1.0 mm further on. Each method gives a displacement field; the labels
of the farther section are carried through it (nearest pixel, background from outside) and compared with the nearer
section's: the mean Dice over structures of either. Folding: the share of pixels where the field's Jacobian determinant
is 0 or less. One thread; seconds of each pair, and of those the processor's. Slow methods are measured on every fourth
pair, and the others there too. Neither a first registration, of another pair, is timed nor the import of peers. Peers
live in .venv-peers (make bench-peers); what was made is kept in bench-out/, and a run that was stopped goes on.
Intervals of 95 %: pairs drawn with replacement, 1,000 times. Limner chains registrations of neighbouring sections when
it completes a stack; the seconds of that row are of the whole chain. The options for sections far apart were chosen on
24 other pairs (from section 34 on).

ANTs draws samples for its affine start and comes out a little differently each time, with a seed too. Reads
LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from limner.intensity import to_8_bit
from limner.metrics.pixels import confusion
from limner.registration.section_warps import register_sections
from limner.registration.velocity_field import Options
from limner.registration.warp import jacobian_determinants, warp
from limner.run_record import machine, package_versions, write_atomically
from limner.volume import LabelMap
from stack_completion import LEVEL, ONE_THREAD, RESAMPLED, ROOT, interval, made, mouse_stack, peer_versions, run_peer
from stack_peers import LNCC_SIGMA, PAIR_PEERS, SYN_CC, small, timed, write

PLACES, GAPS = range(25, 241, 18), (10, 20)  # sections
PAIRS = [(z, z + gap) for gap in GAPS for z in PLACES]
WARMING = (PLACES[0], PLACES[0] + 1)  # a pair that is none of them
METHODS = {
    "none": "none",
    "limner_batch": "Limner, direct, twelve pairs at once",
    "limner_single": "Limner, direct, one pair at a time",
    "limner_distant_batch": "Limner, direct, Options.direct(), twelve pairs at once",
    "limner_distant_single": "Limner, direct, Options.direct(), one pair at a time",
    "limner_chained": "Limner, chained from section to section",
    "ants_affine": "ANTs affine",
    "ants_syn": "ANTs SyN (mutual information)",
    "ants_syncc": "ANTs SyN-CC (40, 20, 0 iterations)",
    "ants_syncc_preset": "ANTs 'SyNCC' (2100, 1200, 1200, 20)",
    "niftyreg": "NiftyReg reg_f3d -vel --lncc",
}
DISTANT = ("limner_distant_batch", "limner_distant_single")
SLOW, EVERY = ("ants_syncc_preset", "niftyreg"), 4
Result = dict[str, Any]


def items(method: str, gap: int | None = None) -> list[int]:
    """Numbers of the pairs that a method is measured on."""
    chosen = [i for i, (a, b) in enumerate(PAIRS) if gap in (None, b - a)]
    return chosen[::EVERY] if method in SLOW else chosen


def by_limner(method: str, levels: np.ndarray, spacing: tuple[float, float], folder: Path) -> None:
    """Displacements of Limner's registration, stored like a peer's.

    With the settings of stack completion, or those for sections far apart.
    """
    sections = levels[:, None]
    options = Options.direct() if method in DISTANT else Options()
    groups = [items(method, gap) for gap in GAPS] if method.endswith("_batch") else [[i] for i in items(method)]
    register_sections(
        sections, [WARMING], spacing, options=options
    )  # libraries load before time is taken, as peers' do
    for group in groups:
        pairs = [PAIRS[i] for i in group]

        def one(pairs: Sequence[tuple[int, int]] = pairs) -> list[np.ndarray]:
            wanted = [(z, z + 1) for z in range(*pairs[0])] if method == "limner_chained" else pairs
            warps = register_sections(sections, wanted, spacing, options=options)
            return [warps.displacement(*pair)[0].numpy() for pair in pairs]

        fields, cost = timed(one)
        shared = {n: np.float64(v / (1 if n == "peak_mb" else len(group))) for n, v in cost.items()}
        for i, field in zip(group, fields, strict=True):
            write(folder / f"{i:04}.npz", {**small({"displacement": field}), **shared})


def dice_and_folding(field: np.ndarray, pair: tuple[int, int], truth: LabelMap) -> tuple[float, float]:
    """Mean Dice of labels carried through a displacement field, and the share of pixels where it folds."""
    spacing = truth.space.spacing[1:]
    displacement = torch.from_numpy(field.astype(np.float32))[None]
    moving = torch.from_numpy(truth.labels[pair[1]].astype(np.float32))[None, None]
    carried = warp(moving, displacement, spacing, "nearest", "zeros")[0, 0].numpy().astype(int)
    _, table = confusion(carried, truth.labels[pair[0]].astype(int))
    sizes = table.sum(axis=0) + table.sum(axis=1)
    folded = (jacobian_determinants(displacement, spacing) <= 0).float().mean()
    return float(np.mean(2 * np.diag(table)[1:] / sizes[1:])), float(folded)  # confusion() has background first


def measure(method: str, folder: Path, truth: LabelMap) -> list[Result] | None:
    """Dice, folding and cost of each pair of a method; None where one is missing."""
    rows = []
    for i in items(method):
        path = folder / method / f"{i:04}.npz"
        if not path.exists():
            return None
        with np.load(path) as stored:
            dice, folding = dice_and_folding(stored["displacement"], PAIRS[i], truth)
            cost = {name: float(stored[name]) for name in ("seconds", "cpu_seconds", "peak_mb")}
        rows.append({"pair": PAIRS[i], "number": i, "dice": dice, "folding": folding, **cost})
    return rows


def table(rows: dict[str, list[Result]], gap: int, some: Sequence[int], spacing_mm: float) -> str:
    """Markdown of one gap, of those pairs alone that are among `some`."""
    lines = [
        f"{gap * spacing_mm:.1f} mm apart, {len(some)} pairs",
        "",
        "| method | mean Dice | folding | seconds a pair | of the processor | peak MB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    drawn = np.random.default_rng(0).integers(len(some), size=(RESAMPLED, len(some)))
    for method, of_method in rows.items():
        chosen = [row for row in of_method if row["number"] in some]
        if len(chosen) != len(some):
            continue
        dice = np.array([row["dice"] for row in chosen])
        low, high = interval(dice[drawn].mean(axis=1))
        mean = {n: np.mean([row[n] for row in chosen]) for n in ("folding", "seconds", "cpu_seconds")}
        lines.append(
            f"| {METHODS[method]} | {dice.mean():.4f} ({low:.3f} to {high:.3f}) | {mean['folding']:.5f} "
            f"| {mean['seconds']:.2f} | {mean['cpu_seconds']:.2f} | {max(row['peak_mb'] for row in chosen):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=METHODS)
    parser.add_argument("--show", action="store_true", help="make nothing; score what is stored")
    parser.add_argument("--peers", type=Path, default=ROOT / ".venv-peers/bin/python", help="their Python")
    parser.add_argument("--store", type=Path, default=Path("bench-out/stack_registration"))
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_registration.json"))
    parser.add_argument("--child", help=argparse.SUPPRESS)
    given = parser.parse_args()
    stack = mouse_stack()
    if stack is None:
        return
    images, truth = stack
    levels, spacing = to_8_bit(images.pixels), truth.space.spacing[1:]
    if given.child:
        (given.store / given.child).mkdir(parents=True, exist_ok=True)
        by_limner(given.child, levels, spacing, given.store / given.child)
        return
    given.store.mkdir(parents=True, exist_ok=True)
    fixed, moving = (levels[list(side)] for side in zip(*PAIRS, strict=True))
    write(given.store / "in.npz", {"fixed": fixed, "moving": moving, "spacing": np.asarray(spacing)})
    for method in given.only or METHODS if not given.show else ():
        make(method, given.store, given.peers, fixed.shape)
    rows = {m: found for m in METHODS if (found := measure(m, given.store, truth)) is not None}
    for gap in GAPS:
        for some in (items("none", gap), items(SLOW[0], gap)):
            print(table(rows, gap, some, truth.space.spacing[0]), end="\n\n")
    versions = package_versions() | {f"peers: {n}": v for n, v in peer_versions(given.peers).items()}
    settings = {"syn_cc": SYN_CC, "lncc_sigma": LNCC_SIGMA, "resampled": RESAMPLED}
    settings |= {"limner": vars(Options()), "limner_distant": vars(Options.direct())}
    result = {"rows": rows, "settings": settings, "interval": LEVEL, "versions": versions, "machine": machine()}
    write_atomically(given.out, lambda handle: handle.write((json.dumps(result, indent=1) + "\n").encode()))


def make(method: str, store: Path, python: Path, shape: tuple[int, ...]) -> None:
    """Make what is missing of a method; a peer that fails is reported and left out."""
    if made(store, method, items(method)):
        return
    print(method, flush=True)
    if method == "none":
        (store / method).mkdir(exist_ok=True)
        zero = {"displacement": np.zeros((2, *shape[1:]), np.float32)}
        for i in items(method):
            write(
                store / method / f"{i:04}.npz",
                {**zero, **dict.fromkeys(("seconds", "cpu_seconds", "peak_mb"), np.zeros(()))},
            )
    elif method in PAIR_PEERS:
        try:
            run_peer(python, method, store, items(method))
        except (subprocess.CalledProcessError, FileNotFoundError) as error:
            print(f"{method} failed ({error}); make bench-peers builds its environment", flush=True)
    else:
        command = [sys.executable, __file__, "--child", method, "--store", store]
        subprocess.run(command, check=True, env={**os.environ, **ONE_THREAD})


if __name__ == "__main__":
    main()
