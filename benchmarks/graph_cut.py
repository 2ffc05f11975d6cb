"""Limner's graph cut beside PyMaxflow's: seconds, memory and energy, each in a process of its own.

    python -m venv peers
    peers/bin/pip install -c constraints.txt numba scipy SimpleITK torch PyMaxflow
    PYTHONPATH=src peers/bin/python benchmarks/graph_cut.py [--sides 128 256] [--gammas .3 1 3] [--out FILE]

PyMaxflow is GPL and stays in an environment of its own. Heat maps: a synthetic ball with noise in every voxel, and one
like a network's, of the hippocampal formation of `stack_stpt_mouse`: its mask blurred, with smooth errors, in a cube
around it (what is beyond the stack is repeated). Seconds are of the whole cut, from heat and image to labels, once
compiled; memory is the most that the process held above what it held before. Reads LIMNER_DATA (default
../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
import SimpleITK as sitk
from scipy import ndimage

from limner.graph_cut import CutOptions, cut, cut_coarse_to_fine, energy, face_weights
from limner.run_record import machine, package_versions

HIPPOCAMPUS, CONTRAST, DELTA = 3, 10.0, 0.1
MOUSE_SPACING = (0.05, 0.04, 0.04)
SOLVERS = ("limner", "pymaxflow", "limner coarse to fine")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sides", type=int, nargs="+", default=[128, 256])
    parser.add_argument("--gammas", type=float, nargs="+", default=[0.3, 1.0, 3.0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/graph_cut.json"))
    parser.add_argument("--child", nargs=3, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.child:
        print(json.dumps(measure(Path(given.child[0]), given.child[1], float(given.child[2]))))
        return
    rows = []
    for side in given.sides:
        for name, (heat, image, spacing) in {"ball": ball(side), "hippocampus": hippocampus(side)}.items():
            with tempfile.TemporaryDirectory() as folder:
                np.savez(Path(folder, "in.npz"), heat=heat, image=image, spacing=spacing)
                for gamma in given.gammas:
                    rows += compare(Path(folder), {"map": name, "side": side, "gamma": gamma})
    result = {"contrast": CONTRAST, "delta": DELTA, "rows": rows, "versions": package_versions(), "machine": machine()}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


def ball(side: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """A ball of .3 of the side, with noise in every voxel of heat and image."""
    draw = np.random.default_rng(0)
    grid = np.arange(side, dtype=np.float32) - side / 2
    inside = sum(g**2 for g in np.meshgrid(grid, grid, grid, sparse=True)) < (0.3 * side) ** 2
    heat = ndimage.gaussian_filter(inside.astype(np.float32), 2) + draw.normal(0, 0.25, inside.shape)
    image = 90 + 40 * inside + draw.normal(0, 8, inside.shape)
    return np.clip(heat, 0, 1).astype(np.float32), np.clip(image, 0, 255).astype(np.uint8), (1.0, 1.0, 1.0)


def hippocampus(side: int) -> tuple[np.ndarray, np.ndarray, tuple[float, ...]]:
    """A heat map that is wrong in patches, as a network's is."""
    folder = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    image = sitk.GetArrayFromImage(sitk.ReadImage(folder / "stpt_native_50x40x40um.nii.gz"))
    labels = sitk.GetArrayFromImage(sitk.ReadImage(folder / "coarse_native_50x40x40um.nii.gz"))
    centre = [round(c) for c in ndimage.center_of_mass(labels == HIPPOCAMPUS)]
    cube = np.ix_(
        *(np.clip(np.arange(side) - side // 2 + c, 0, n - 1) for c, n in zip(centre, image.shape, strict=True))
    )
    inside, levels = labels[cube] == HIPPOCAMPUS, image[cube].astype(np.float32)
    draw = np.random.default_rng(1)
    errors = ndimage.gaussian_filter(draw.normal(size=inside.shape).astype(np.float32), 3)
    heat = ndimage.gaussian_filter(inside.astype(np.float32), 3) + 0.2 * errors / errors.std()
    levels *= 255 / np.percentile(levels, 99.5)
    return np.clip(heat, 0, 1).astype(np.float32), np.clip(levels, 0, 255).astype(np.uint8), MOUSE_SPACING


def compare(folder: Path, case: dict[str, Any]) -> list[dict[str, Any]]:
    rows = []
    for solver in SOLVERS:
        command = [sys.executable, __file__, "--child", str(folder), solver, str(case["gamma"])]
        found = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
        rows.append({**case, "solver": solver, **found})
    exact = rows[1]["energy"]
    for row in rows:
        row["energy_above_pymaxflow"] = row["energy"] / exact - 1
        print({key: round(value, 7) if isinstance(value, float) else value for key, value in row.items()}, flush=True)
    return rows


def measure(folder: Path, solver: str, gamma: float) -> dict[str, Any]:
    """One cut, after one of a few voxels for which the functions are compiled."""
    solve = {"limner": cut, "pymaxflow": by_pymaxflow, "limner coarse to fine": coarse_to_fine}[solver]
    options = CutOptions(gamma, CONTRAST, DELTA)
    with np.load(folder / "in.npz") as given:
        heat, image, spacing = given["heat"], given["image"], tuple(given["spacing"].tolist())
    few = np.s_[:9, :9, :9]
    solve(heat[few].copy(), image[few].copy(), spacing, options)
    before = memory("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # the peak is counted from here
    began, cpu = time.perf_counter(), time.process_time()
    labels = solve(heat, image, spacing, options)
    seconds, cpu = time.perf_counter() - began, time.process_time() - cpu
    peak = memory("VmHWM") - before
    found = energy(labels, heat, image, spacing, options)
    voxels = int(labels.sum())
    return {"seconds": seconds, "cpu_seconds": cpu, "memory_gb": peak / 1e6, "energy": found, "organ_voxels": voxels}


def memory(which: str) -> int:
    """kB."""
    status = Path("/proc/self/status").read_text()
    return int(next(line for line in status.splitlines() if line.startswith(which)).split()[1])


def coarse_to_fine(heat: np.ndarray, image: np.ndarray, spacing: Any, options: CutOptions) -> np.ndarray:
    """From an eighth of the voxels."""
    return cut_coarse_to_fine(heat, image, spacing, options, max_voxels=-(-heat.size // 8)).labels


def by_pymaxflow(heat: np.ndarray, image: np.ndarray, spacing: Any, options: CutOptions) -> np.ndarray:
    """Capacities in numpy, as its documentation shows, in one precision that keeps their memory low."""
    import maxflow

    graph = maxflow.Graph[float](heat.size, 3 * heat.size)
    nodes = graph.add_grid_nodes(heat.shape)
    for axis, face in enumerate(face_weights(spacing)):
        weights = np.zeros(heat.shape, np.float32)
        step = np.diff(image.astype(np.float32), axis=axis)
        first = tuple(slice(0, -1) if a == axis else slice(None) for a in range(3))
        weights[first] = options.gamma * face * (np.exp(-(step**2) / options.contrast**2) + options.delta)
        structure = np.zeros((3, 3, 3))
        structure[tuple(2 if a == axis else 1 for a in range(3))] = 1
        graph.add_grid_edges(nodes, weights, structure, symmetric=True)
    graph.add_grid_tedges(nodes, heat, 1 - heat)
    graph.maxflow()
    return ~graph.get_grid_segments(nodes)


if __name__ == "__main__":
    main()
