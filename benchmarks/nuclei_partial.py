"""Nuclei from partial annotation: weighted background beside plain cross-entropy, all labels, and Otsu with watershed.

    python benchmarks/nuclei_partial.py [--out benchmarks/results/nuclei_partial.json] [--jobs 2] [--settings key=value]
    python benchmarks/nuclei_partial.py --tune --out FILE --settings key=value   # on MoNuSeg alone

Trained on MoNuSeg and on four of the six TNBC patients with a share of the nuclei kept, tested on the two patients left
out; three folds. `--tune` trains on seven MoNuSeg tiles and tests on the other six, of other patients: there settings
were chosen, so that TNBC stays unseen. Runs that the file holds already are not repeated. Reads LIMNER_DATA (default
../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, replace
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
import torch
from skimage.color import rgb2hed
from skimage.filters import gaussian, threshold_otsu

from limner.annotations import simulate_partial
from limner.inference import Options, predict
from limner.methods.partial_nuclei import NUCLEUS, AnnotatedTile, Separation, Settings, build, separate, train
from limner.metrics.objects import ObjectScore, score_objects, summarise, summarise_groups
from limner.networks.tiled_unet import TiledUNet
from limner.run_record import machine, package_versions

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))
FOLDS = (("01", "02"), ("03", "04"), ("05", "06"))  # patients left out together
SHOWN = ("pixel_f1", "pixel_iou", "aji", "pq", "f1")
BASE = Settings(width=8, steps=400)
WITH_SPLIT, WITHOUT = Separation(), Separation(split=False)


@dataclass(frozen=True)
class Run:
    """One training and its test."""

    arm: str  # 'weighted', 'plain', 'all' or 'otsu'
    fraction: float
    seed: int
    left_out: tuple[str, ...]
    settings: Settings

    @property
    def name(self) -> str:
        return f"{self.arm} {self.fraction:g} seed {self.seed} left out {'+'.join(self.left_out)}"


def read_tiles(folder: str) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """RGB image and instance labels of every tile of a set, by name."""
    names = sorted(p.name for p in (DATA / folder / "images").glob("*.png"))
    return {n: (iio.imread(DATA / folder / "images" / n), iio.imread(DATA / folder / "labels" / n)) for n in names}


def split(left_out: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tiles to train on and to test on."""
    monuseg = read_tiles("nuclei_monuseg")
    if left_out == ("monuseg",):
        held = set(list(monuseg)[::2][:6])  # every other: organs come in order of their names
        return {n: t for n, t in monuseg.items() if n not in held}, {n: t for n, t in monuseg.items() if n in held}
    tnbc = read_tiles("nuclei_tnbc")
    test = {n: t for n, t in tnbc.items() if n.split("_")[0] in left_out}
    return monuseg | {n: t for n, t in tnbc.items() if n not in test}, test


def probability_of(network: TiledUNet, image: np.ndarray) -> np.ndarray:
    """Probability of nucleus (Y, X)."""
    found = np.zeros(image.shape[:2], np.float32)

    def write(tile: Any, probabilities: np.ndarray) -> None:
        found[tile.kept.slices] = probabilities[NUCLEUS]

    predict(network, image, write, Options(device="cpu"))
    return found


def otsu(image: np.ndarray) -> np.ndarray:
    """1 where smoothed haematoxylin is above Otsu's threshold, else 0."""
    stain = gaussian(rgb2hed(image)[..., 0], 1)
    return (stain > threshold_otsu(stain)).astype(np.float32)


def compute(run: Run) -> dict[str, Any]:
    """Train and test; scores of every test image, with and without splitting."""
    torch.set_num_threads(1)
    training, test = split(run.left_out)
    began = time.monotonic()
    losses: list[float] = []
    if run.arm == "otsu":
        probabilities = {name: otsu(image) for name, (image, _) in test.items()}
    else:
        tiles = [
            AnnotatedTile.from_labels(image, simulate_partial(labels, run.fraction, 1000 * run.seed + i), run.settings)
            for i, (image, labels) in enumerate(training.values())
        ]
        network = build(run.settings)
        losses = train(network, tiles, run.settings)
        network.eval()
        probabilities = {name: probability_of(network, image) for name, (image, _) in test.items()}
    seconds = time.monotonic() - began
    px = run.settings.um_per_px
    objects = {
        how: {n: score_objects(separate(p, px, s), test[n][1]) for n, p in probabilities.items()}
        for how, s in (("split", WITH_SPLIT), ("not split", WITHOUT))
    }
    if run.arm == "plain":  # as if the share of nuclei that are annotated were known (Elkan and Noto 2008)
        objects["rescaled"] = {
            n: score_objects(separate(p / np.float32(run.fraction), px, WITH_SPLIT), test[n][1])
            for n, p in probabilities.items()
        }
    return {
        "seconds": round(seconds),
        "loss": float(np.mean(losses[-50:])) if losses else None,
        "counts": {how: {n: asdict(s) for n, s in found.items()} for how, found in objects.items()},
    }


def runs(settings: Settings, arms: Iterable[str], left_out: Sequence[tuple[str, ...]]) -> list[Run]:
    """Runs of all folds, the most telling first."""
    plan = [("weighted", 0.25, 0), ("plain", 0.25, 0), ("all", 1.0, 0), ("otsu", 1.0, 0)]
    once = ((0.1, 0), (0.5, 0), (0.25, 1), (0.25, 2))
    plan += [("weighted", f, s) for f, s in once] + [("plain", *once[0]), ("plain", *once[1]), ("weighted", 1.0, 0)]
    plan += [("plain", f, s) for f, s in once[2:]]
    loss = {"weighted": "weighted", "plain": "plain", "all": "plain", "otsu": "plain"}
    return [
        Run(arm, fraction, seed, fold, replace(settings, loss=loss[arm], seed=seed))
        for arm, fraction, seed in plan
        if f"{arm} {fraction:g} {seed}" in arms or arm in arms
        for fold in left_out
    ]


def means_of(results: Mapping[str, Any]) -> dict[tuple[str, str], dict[str, Any]]:
    """By arm and separation: mean scores over images, then over seeds; a seed counts when all its folds are there."""
    groups: dict[tuple[str, str], dict[str, dict[str, Any]]] = {}
    for name, result in results.items():
        arm, fraction, _, seed = name.split()[:4]
        for how, images in result["counts"].items():
            groups.setdefault((f"{arm} {fraction}", how), {}).setdefault(seed, {}).update(images)
    most = max(len(images) for seeds in groups.values() for images in seeds.values())
    means = {}
    for group, seeds in groups.items():
        whole = [images for images in seeds.values() if len(images) == most]
        of_seeds = {k: [mean_of(k, images) for images in whole] for k in SHOWN} if whole else {}
        means[group] = {
            "seeds": len(whole),
            **{k: float(np.mean(values)) for k, values in of_seeds.items()},
            **{
                f"{k} SD over seeds": float(np.std(values, ddof=1)) for k, values in of_seeds.items() if len(values) > 1
            },
        }
    return {group: mean for group, mean in means.items() if mean["seeds"]}


def table(means: Mapping[tuple[str, str], Mapping[str, Any]]) -> str:
    """The means, and how much of the gap between plain cross-entropy and all labels the weighted background closes."""
    rows = [f"{'':16}{'':10}{'seeds':6}" + "".join(f"{k:>10}" for k in SHOWN)]
    for (arm, how), mean in means.items():
        rows.append(f"{arm:16}{how:10}{mean['seeds']:<6}" + "".join(f"{mean[k]:10.3f}" for k in SHOWN))
    for fraction in ("0.1", "0.25", "0.5"):
        groups = [(arm, "split") for arm in (f"weighted {fraction}", f"plain {fraction}", "all 1")]
        if all(group in means for group in groups):
            weighted, low, high = (means[group] for group in groups)
            shares = [(weighted[k] - low[k]) / (high[k] - low[k]) for k in SHOWN]
            rows.append(f"gap closed at {fraction:16}  " + "".join(f"{100 * share:9.0f}%" for share in shares))
    return "\n".join(rows)


def mean_of(score: str, images: Mapping[str, Any]) -> float:
    """Mean over images; those where it is undefined, without any object, are left out."""
    return float(np.nanmean([score_of(counts).scores()[score] for counts in images.values()]))


def per_patient(results: Mapping[str, Any]) -> dict[str, Any]:
    """Mean scores per patient and over all, for each arm and seed; None where a score is undefined."""
    found: dict[str, Any] = {}
    for name, result in results.items():
        run = " ".join(name.split()[:4])
        for how, images in result["counts"].items():
            found.setdefault(f"{run} {how}", {}).update({n: score_of(counts) for n, counts in images.items()})
    patients = {n: n.split("_")[0] for images in found.values() for n in images}
    return {
        run: {
            "overall": summarise(list(images.values())).to_json(),
            "patients": {g: s.to_json() for g, s in summarise_groups(images, patients).items()},
        }
        for run, images in found.items()
    }


def score_of(counts: Mapping[str, Any]) -> ObjectScore:
    """The score whose counts were stored."""
    return ObjectScore(**counts)


def parse(text: str) -> tuple[str, Any]:
    """Setting and value of ``key=value``."""
    key, value = text.split("=")
    return key, type(getattr(BASE, key))(value)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/nuclei_partial.json"))
    parser.add_argument("--jobs", type=int, default=2)
    parser.add_argument("--tune", action="store_true")
    parser.add_argument("--arms", nargs="*", default=["weighted", "plain", "all", "otsu"])
    parser.add_argument("--settings", nargs="*", default=[], metavar="KEY=VALUE")
    given = parser.parse_args()
    if not (DATA / "nuclei_tnbc").is_dir():
        print("skipped: no data")
        return
    settings = replace(BASE, **dict(map(parse, given.settings)))
    about = {"settings": asdict(settings), "separation": asdict(WITH_SPLIT)}
    content = json.loads(given.out.read_text()) if given.out.exists() else {**about, "runs": {}}
    if {key: content[key] for key in about} != about:
        raise SystemExit(f"{given.out} comes from other settings; name another file")
    content |= {"machine": machine(), "versions": package_versions()}
    todo = [
        run
        for run in runs(settings, given.arms, [("monuseg",)] if given.tune else FOLDS)
        if run.name not in content["runs"]
    ]
    with ProcessPoolExecutor(given.jobs, mp_context=get_context("spawn")) as pool:
        futures = {pool.submit(compute, run): run for run in todo}
        for done, future in enumerate(as_completed(futures), 1):
            content["runs"][futures[future].name] = future.result()
            content["summary"] = per_patient(content["runs"])
            given.out.write_text(json.dumps(content) + "\n")
            print(f"{done} of {len(todo)}: {futures[future].name}, {future.result()['seconds']} s", flush=True)
    means = means_of(content["runs"])
    content["means"] = {" ".join(group): mean for group, mean in means.items()}
    given.out.write_text(json.dumps(content) + "\n")
    print(table(means))


if __name__ == "__main__":
    main()
