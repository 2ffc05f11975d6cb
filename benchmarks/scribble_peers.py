"""Peers of scribbles: scikit-image's random walker, and a random forest with PyMaxflow's graph cut.

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch numba scipy SimpleITK tifffile imagecodecs imageio zarr numcodecs \\
        dask safetensors scikit-image pyamg scikit-learn PyMaxflow
    OMP_NUM_THREADS=1 PYTHONPATH=src peers/bin/python benchmarks/scribble_peers.py [--only NAME ...] [--out FILE]

PyMaxflow is GPL; like the others it stays in an environment of its own. Each row is made in a process of its own that
is given an image and strokes alone; a stopped run goes on with the first row that is missing.

- Random walker: on the whole volume at full size, conjugate gradients with a multigrid preconditioner (faster here than
  with Jacobi's, and nearer to convergence at the default tolerance). `spacing` divides grey-level differences in
  scikit-image, so a wide gap between sections makes it leak along z: true spacing (in plane 1) and unit spacing are
  both tried, but where voxels are cubes. Beta: the default, and 10,000, chosen on animals of `mouse_mri` that are not
  among the cases (mean IoU over both organs, seed 0: of the first animal with 130 / 1,000 / 3,000 / 10,000 / 30,000
  .570 / .572 / .594 / .601 / .568; of the first three with 3,000 / 10,000 .587 / .620).
- Random forest: features in plane, as in ilastik, at four scales, with the voxel's place; trained on the strokes alone.
  Its heat is cut with the energy of `limner.graph_cut` at several gammas, strokes as hard seeds. The forest's seconds
  are in each of the rows that share its heat, the memory is the larger of the two.

Five scribbled sections on all cases, then one to six on `stack_stpt_mouse`, seed 0, with the random walker and the
forest's row that have the best mean IoU over its organs and seeds: chosen with the truth, which flatters them. Seconds
are of the whole peer, from image and strokes to labels; memory is the most that the process held above what it held
before. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage

from graph_cut import by_pymaxflow, memory
from limner.graph_cut import CutOptions
from limner.intensity import to_8_bit
from limner.run_record import machine, package_versions, write_atomically
from scribble_cases import DATA, Case, mouse_mri, mouse_stack, scores

BETAS = (130, 10000)  # the default, and a better one
WALKERS = {f"random walker, beta {beta}, {kind} spacing": (beta, kind) for beta in BETAS for kind in ("true", "unit")}
FOREST = "random forest"
CUTS = {f"random forest, graph cut, gamma {gamma}": gamma for gamma in (0.3, 1.0, 3.0, 10.0)}
SIGMAS = (1, 2, 4, 8)  # pixels
TREES, SMALLEST_LEAF = 200, 3
HARD = 1000.0  # of a seed: more than its neighbours can hold
SECTIONS, SEEDS, CURVE = 5, (0, 1, 2), range(1, 7)
PACKAGES = ("scikit-learn", "pyamg", "PyMaxflow")
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", help="volumes, by the beginning of their names")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scribble_peers.json"))
    parser.add_argument("--child", nargs=2, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Path(given.child[0]), given.child[1])))
        return
    if not DATA.is_dir():
        print(f"skipped: no data at {DATA}")
        return
    results = Results(given.out)
    stack = mouse_stack()
    chosen = [c for c in [*stack, *mouse_mri(slice(10, 15))] if c.name.startswith(tuple(given.only or [""]))]
    for seed in SEEDS:
        for case in chosen:
            if seed == 0 or case in stack:
                results.add(case, SECTIONS, seed, [*walkers(case), FOREST, *CUTS])
    curves = [case for case in chosen if case in stack]
    best = results.best(stack[0].name) if curves else []
    for case in curves:
        for n in CURVE:
            results.add(case, n, 0, best)


def walkers(case: Case) -> list[str]:
    """Names of the random walkers; true spacing is unit spacing where voxels are cubes."""
    cubes = np.allclose(case.images.space.spacing, case.images.space.spacing[0])
    return [name for name, (_, kind) in WALKERS.items() if not (cubes and kind == "true")]


class Results:
    """The rows so far, in a file that is written after each.

    Parameters
    ----------
    path : Path
        Of the file; rows that are there are kept.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.rows: list[Row] = json.loads(path.read_text())["rows"] if path.exists() else []

    def add(self, case: Case, n_sections: int, seed: int, peers: list[str]) -> None:
        """Measure the peers that are missing for strokes on so many sections."""
        key = {"volume": case.name, "organ": case.organ, "n_sections": n_sections, "seed": seed}
        done = [row["peer"] for row in self.rows if all(row[name] == value for name, value in key.items())]
        missing = [peer for peer in peers if peer not in done]
        if not missing:
            return
        sections = case.sections(n_sections)
        marks = case.scribbles(sections, seed).to_marks().labels
        with tempfile.TemporaryDirectory() as folder:
            given = {"pixels": case.images.pixels, "marks": marks, "spacing": case.images.space.spacing}
            np.savez(Path(folder, "in.npz"), **given)
            for peer, found, cost in in_processes(Path(folder), missing):
                row = {**key, "sections": sections, "peer": peer, **scores(found, case.truth), **cost}
                self.rows.append(row)
                self.write()
                print({k: round(v, 4) if isinstance(v, float) else v for k, v in row.items()}, flush=True)

    def write(self) -> None:
        """All rows, with settings, versions and machine."""
        versions = package_versions() | {name: importlib.metadata.version(name) for name in PACKAGES}
        settings = {"sigmas": SIGMAS, "trees": TREES, "smallest_leaf": SMALLEST_LEAF, "cut": vars(CutOptions())}
        result = {"rows": self.rows, "settings": settings, "versions": versions, "machine": machine()}
        text = json.dumps(result, indent=1) + "\n"
        write_atomically(self.path, lambda handle: handle.write(text.encode()))

    def best(self, volume: str) -> list[str]:
        """The random walker and the forest's row with the best mean IoU over organs and seeds of a volume."""

        def mean_iou(peer: str) -> float:
            rows = [row for row in self.rows if row["peer"] == peer and row["volume"] == volume]
            return float(np.mean([row["iou"] for row in rows if row["n_sections"] == SECTIONS]))

        return [max(WALKERS, key=mean_iou), max([FOREST, *CUTS], key=mean_iou)]


def in_processes(folder: Path, peers: list[str]) -> Iterator[tuple[str, np.ndarray, Row]]:
    """Labels and cost of each peer; the forest's heat is found once for all of its cuts."""
    forest: Row = {}
    for peer in peers:
        if peer in CUTS and not forest:
            forest, _ = in_process(folder, FOREST)
        cost, found = in_process(folder, peer)
        forest = cost if peer == FOREST else forest
        yield peer, found, with_forest(cost, forest) if peer in CUTS else cost


def with_forest(cost: Row, forest: Row) -> Row:
    """What a cut costs together with the forest whose heat it cuts."""
    both = {name: cost[name] + forest[name] for name in ("seconds", "cpu_seconds")}
    return {**cost, **both, "memory_gb": max(cost["memory_gb"], forest["memory_gb"]), "cut_seconds": cost["seconds"]}


def in_process(folder: Path, peer: str) -> tuple[Row, np.ndarray]:
    command = [sys.executable, __file__, "--child", str(folder), peer]
    cost = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
    return cost, np.load(folder / "found.npy")


def measure(folder: Path, peer: str) -> Row:
    """What a peer costs; its labels are left in the folder."""
    with np.load(folder / "in.npz") as given:
        pixels, marks, spacing = given["pixels"], given["marks"], tuple(given["spacing"].tolist())
    solve = prepared(folder, peer)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    began, cpu = time.perf_counter(), time.process_time()
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        found = solve(pixels, marks, spacing)
    cost = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu}
    cost["memory_gb"] = (memory("VmHWM") - before) / 1e6
    np.save(folder / "found.npy", found)
    return cost | {"warnings": sorted({str(warning.message).split(".")[0] for warning in said})}


def prepared(folder: Path, peer: str) -> Callable[..., np.ndarray]:
    """The peer, with its packages imported, as a function of pixels, marks and spacing."""
    if peer in WALKERS:
        from skimage.segmentation import random_walker

        return lambda *given: walked(random_walker, *WALKERS[peer], *given)
    if peer in CUTS:
        import maxflow  # noqa: F401

        heat = np.load(folder / "heat.npy")
        return lambda *given: cut(heat, CutOptions(CUTS[peer]), *given)
    from sklearn.ensemble import RandomForestClassifier

    forest = RandomForestClassifier(TREES, min_samples_leaf=SMALLEST_LEAF, n_jobs=1, random_state=0)

    def solve(pixels: np.ndarray, marks: np.ndarray, _: Any) -> np.ndarray:
        heat = forest_heat(forest, pixels, marks)
        np.save(folder / "heat.npy", heat)
        return heat > 0.5

    return solve


def walked(
    random_walker: Callable[..., np.ndarray],
    beta: float,
    kind: str,
    pixels: np.ndarray,
    marks: np.ndarray,
    spacing: tuple[float, ...],
) -> np.ndarray:
    """The image is scaled to [0, 1], as scikit-image takes its beta to be for."""
    steps = np.array(spacing) / spacing[1] if kind == "true" else np.ones(3)
    levels = to_8_bit(pixels) / 255
    return random_walker(levels, marks.astype(np.int32), beta=beta, mode="cg_mg", spacing=steps, copy=False) == 2


def forest_heat(forest: Any, pixels: np.ndarray, marks: np.ndarray) -> np.ndarray:
    """How likely each voxel is in the organ, section by section; shape (Z, Y, X)."""
    levels = to_8_bit(pixels)
    drawn = np.flatnonzero(marks.any(axis=(1, 2)))
    samples = np.concatenate([features(levels[z], z)[marks[z].ravel() > 0] for z in drawn])
    forest.fit(samples, np.concatenate([marks[z][marks[z] > 0] for z in drawn]))
    sections = (forest.predict_proba(features(section, z))[:, 1] for z, section in enumerate(levels))
    return np.stack([section.reshape(levels.shape[1:]).astype(np.float32) for section in sections])


def features(section: np.ndarray, z: int) -> np.ndarray:
    """Of each pixel of a section (Y, X): its level, its place, and per sigma seven filters; shape (Y * X, 32)."""
    from skimage.feature import hessian_matrix, hessian_matrix_eigvals, structure_tensor, structure_tensor_eigenvalues

    y, x = np.indices(section.shape, np.float32)
    found = [section, np.full_like(y, z), y, x]
    for sigma in SIGMAS:
        smooth = ndimage.gaussian_filter(section, sigma, mode="nearest")
        hessian = hessian_matrix(section, sigma=sigma, mode="nearest", order="rc", use_gaussian_derivatives=False)
        tensor = structure_tensor(smooth, sigma=sigma, mode="nearest", order="rc")
        found += [smooth, ndimage.gaussian_gradient_magnitude(section, sigma, mode="nearest")]
        found += [ndimage.gaussian_laplace(section, sigma, mode="nearest")]
        found += [*hessian_matrix_eigvals(hessian), *structure_tensor_eigenvalues(tensor)]
    return np.stack([feature.ravel() for feature in found], axis=1).astype(np.float32)


def cut(
    heat: np.ndarray, options: CutOptions, pixels: np.ndarray, marks: np.ndarray, spacing: tuple[float, ...]
) -> np.ndarray:
    """Strokes are seeds: heat so far outside [0, 1] that no neighbours outweigh it."""
    seeded = np.where(marks == 2, HARD, np.where(marks == 1, 1 - HARD, heat)).astype(np.float32)
    return by_pymaxflow(seeded, np.round(to_8_bit(pixels)).astype(np.uint8), spacing, options)


if __name__ == "__main__":
    main()
