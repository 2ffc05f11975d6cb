"""Membranes of `em_isbi2012`: trained on sections 00 to 14, tested on 15 to 19; a U-Net and a random forest beside.

    python benchmarks/membranes.py [--only NAME ...] [--steps N] [--seed N] [--out FILE]

Rows: the network without and with its auxiliary classifiers, a U-Net of the same cost, a random forest on filters
in plane at five scales (gaussians, edges, eigenvalues of the Hessian and of the structure tensor); each with and
without the watershed fusion, whose w_f and depth are chosen on the training sections, and with the tested sections as
they are and smoothed until they are no noisier than those trained on. Trained models are kept beside
the results and are no part of the project; a stopped run goes on with the first row that is missing. Seconds are of one
thread. Reads LIMNER_DATA (default ../shared/data); a forest needs scikit-learn, in the peers' environment.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from numpy.typing import NDArray
from scipy import ndimage

from limner.checkpoint import Checkpoint
from limner.methods.membranes import (
    Averaging,
    Settings,
    TracedSection,
    choose_fusion,
    fit,
    from_model,
    fused_map,
    known_noise,
    membrane_map,
    to_model,
)
from limner.metrics.neurites import LOWER_IS_BETTER, MapScore, score_maps
from limner.model_file import read_model
from limner.run_record import content_key, machine, package_versions
from limner.section_grey import Smoothed, smoothing_to

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "em_isbi2012"
TRAINED, TESTED = range(15), range(15, 20)
NETWORKS: dict[str, dict[str, Any]] = {
    "contextual, no auxiliary classifiers": {"auxiliary": 0.0},
    "contextual, auxiliary classifiers": {},
    "U-Net": {"network": "unet"},
}
FOREST = "random forest"
SIGMAS = (0.7, 1.5, 3.0, 5.0, 10.0)
TREES, SMALLEST_LEAF, PIXELS = 200, 3, 200_000
Maps = list[NDArray[np.float32]]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=[*NETWORKS, FOREST], default=[*NETWORKS, FOREST])
    parser.add_argument("--steps", type=int, default=0, help="0: the default of `limner membranes fit`")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/membranes.json"))
    given = parser.parse_args()
    if not DATA.is_dir():
        print(f"skipped: no data at {DATA}")
        return
    torch.set_num_threads(1)
    trained, tested = ([section(i) for i in some] for some in (TRAINED, TESTED))
    for name in given.only:
        rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
        key = {"name": name, "steps": given.steps, "seed": given.seed}
        if any(all(row[k] == v for k, v in key.items()) for row in rows):
            continue
        if name == FOREST and importlib.util.find_spec("sklearn") is None:
            print(f"{FOREST}: skipped, scikit-learn is not installed")
            continue
        make, cost = forest(trained, given.seed) if name == FOREST else network(key, trained, given.out.parent)
        new = list(scored(make, trained, tested))
        rows = (
            json.loads(given.out.read_text())["rows"] if given.out.exists() else []
        )  # another run may have added some
        rows += [{**key, **cost, **row} for row in new]
        about = {"versions": package_versions(), "machine": machine()}
        given.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


def section(i: int) -> TracedSection:
    """A section of the stack; its labels are 0 on membrane."""
    return TracedSection(iio.imread(DATA / f"images/{i:02}.png"), iio.imread(DATA / f"labels/{i:02}.png") == 0)


def network(
    key: dict[str, Any], trained: list[TracedSection], folder: Path
) -> tuple[Callable[[TracedSection], NDArray[np.float32]], dict[str, Any]]:
    """What gives a section's map by a network, trained unless its file is there; and what it cost."""
    settings = Settings(**NETWORKS[key["name"]], steps=key["steps"], seed=key["seed"])
    stem = f"{key['name'].replace(' ', '_').replace(',', '')}-{content_key(asdict(settings))[:8]}"
    file = folder / f"membranes_{stem}.safetensors"
    if not file.exists():
        began, cpu = time.perf_counter(), time.process_time()
        checkpoint = Checkpoint(file.with_suffix(".checkpoint"), stem)

        def progress(step: int, steps: int) -> None:
            if step % 100 == 0:
                print(f"{key['name']}: {step} of {steps}, {time.perf_counter() - began:.0f} s", flush=True)

        model, losses = fit(trained, settings, progress=progress, checkpoint=checkpoint)
        cost = {"training_seconds": time.perf_counter() - began, "training_cpu_seconds": time.process_time() - cpu}
        to_model(model, {**cost, "losses": losses[-20:]}).write(file)
        checkpoint.remove()
    read = read_model(file)
    model = from_model(read)
    parameters = sum(weight.numel() for weight in model.network.parameters())
    cost = {name: read.record[name] for name in ("training_seconds", "training_cpu_seconds")}
    return lambda one: membrane_map(model.network, one.image, Averaging()), {"parameters": parameters, **cost}


def forest(
    trained: list[TracedSection], seed: int
) -> tuple[Callable[[TracedSection], NDArray[np.float32]], dict[str, Any]]:
    """The same by a random forest on some pixels of the traced sections."""
    from sklearn.ensemble import RandomForestClassifier

    began, cpu = time.perf_counter(), time.process_time()
    draw = np.random.default_rng(seed)
    pixels, classes = [], []
    for one in trained:
        some = draw.choice(one.membrane.size, PIXELS // len(trained), replace=False)
        pixels.append(features(one.image)[some])
        classes.append(one.membrane.ravel()[some])
    trees = RandomForestClassifier(TREES, min_samples_leaf=SMALLEST_LEAF, n_jobs=1, random_state=seed)
    trees.fit(np.concatenate(pixels), np.concatenate(classes))
    cost = {"training_seconds": time.perf_counter() - began, "training_cpu_seconds": time.process_time() - cpu}

    def make(one: TracedSection) -> NDArray[np.float32]:
        found = trees.predict_proba(features(one.image))[:, 1]
        return np.asarray(found.reshape(one.image.shape), np.float32)

    return make, cost


def features(image: NDArray[Any]) -> NDArray[np.float32]:
    """Filters of each pixel, (Y * X, C): as in ilastik, at five scales."""
    grey = (image.astype(np.float32) - image.mean()) / image.std()
    maps = [grey]
    for sigma in SIGMAS:
        maps += [ndimage.gaussian_filter(grey, sigma), ndimage.gaussian_gradient_magnitude(grey, sigma)]
        maps += [ndimage.gaussian_laplace(grey, sigma)]
        yy, xx, yx = (ndimage.gaussian_filter(grey, sigma, order=order) for order in ((2, 0), (0, 2), (1, 1)))
        maps += eigenvalues(yy, xx, yx)
        y, x = (ndimage.gaussian_filter(grey, sigma, order=order) for order in ((1, 0), (0, 1)))
        maps += eigenvalues(*(ndimage.gaussian_filter(part, sigma / 2 + 0.5) for part in (y * y, x * x, y * x)))
    return np.stack(maps, axis=-1).reshape(-1, len(maps))


def eigenvalues(yy: Any, xx: Any, yx: Any) -> list[Any]:
    """Of symmetric 2 x 2 matrices, the larger first."""
    middle, apart = (yy + xx) / 2, np.sqrt(((yy - xx) / 2) ** 2 + yx**2)
    return [middle + apart, middle - apart]


def scored(
    make: Callable[[TracedSection], NDArray[np.float32]], trained: list[TracedSection], tested: list[TracedSection]
) -> list[dict[str, Any]]:
    """Scores of the map and of the fused map on the tested sections, noise as it is and matched."""
    fusion, noise = choose_fusion([make(one) for one in trained], trained), known_noise(trained)
    truth = [~one.membrane for one in tested]
    rows = []
    for matched in (False, True):
        began, cpu = time.perf_counter(), time.process_time()
        maps = [make(quiet(one, noise) if matched else one) for one in tested]
        seconds = (time.perf_counter() - began) / len(tested), (time.process_time() - cpu) / len(tested)
        for fused in (False, True):
            score = score_maps([fused_map(p, fusion) for p in maps] if fused else maps, truth)
            cost = {"seconds_a_section": seconds[0], "cpu_seconds_a_section": seconds[1]}
            row = {"matched_noise": matched, "fused": fused, "fusion": asdict(fusion), **cost, **in_numbers(score)}
            print({k: row[k] for k in ("matched_noise", "fused", "best", "half")}, flush=True)
            rows.append(row)
    return rows


def quiet(one: TracedSection, noise: float) -> TracedSection:
    """A section no noisier than those trained on."""
    smoothing = smoothing_to(one.image, noise)
    if not smoothing.sigma:
        return one
    return TracedSection(Smoothed(one.image, smoothing)[:, :], one.membrane)


def in_numbers(score: MapScore) -> dict[str, Any]:
    """Each score at its own best threshold, and all at 0.5."""
    best = {}
    for name in ("v_rand", "v_info", *LOWER_IS_BETTER):
        threshold, at = score.best(name)
        best[name] = {"value": getattr(at.overall, name), "threshold": threshold}
    sections = [one.v_rand for one in score.at_half.sections]
    return {"best": best, "half": score.at_half.overall.to_json(), "v_rand_at_half_of_sections": sections}


if __name__ == "__main__":
    main()
