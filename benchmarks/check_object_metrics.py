"""Limner's object scores beside those of stardist and cellpose, on real nuclei with perturbed labels.

    python -m venv peers
    peers/bin/pip install -c constraints.txt torch
    peers/bin/pip install --no-deps stardist cellpose
    peers/bin/pip install csbdeep numba scikit-image tqdm fastremap fill-voids natsort roifile imagecodecs \
        opencv-python-headless
    PYTHONPATH=src peers/bin/python benchmarks/check_object_metrics.py [--json FILE]

The two pin other versions than Limner and live in an environment of their own. Each tile of `nuclei_tnbc` is predicted
by its own labels, warped, with nuclei lost, merged, cut in two and made up, at three strengths; a seed fixes them all.
Where both compute the same thing the largest difference is printed and must be 0 (counts) or rounding (PQ: stardist
0.9 computes in single precision); how far the kinds of AJI lie apart is printed beside it. Reads LIMNER_DATA (default
../shared/data).
"""

from __future__ import annotations

import argparse
import importlib.metadata
import json
import os
import sys
from pathlib import Path
from typing import Any

import imageio.v3 as iio
import numpy as np
from cellpose.metrics import aggregated_jaccard_index, average_precision
from numpy.typing import NDArray
from scipy.ndimage import gaussian_filter, map_coordinates
from stardist.matching import matching

from limner.metrics.objects import ObjectScore, count_overlaps, pool_scores, score_objects

STRENGTHS = (0.5, 1.0, 2.0)
THRESHOLDS = (0.1, 0.3, 0.5, 0.7, 0.9)
Labels = NDArray[np.int64]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    folder = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "nuclei_tnbc" / "labels"
    rows, scores = [], []
    for number, file in enumerate(sorted(folder.glob("*.png"))):
        truth = numbered(iio.imread(file).astype(np.int64))
        for strength in STRENGTHS:
            predicted = numbered(perturb(truth, strength, np.random.default_rng([number, int(10 * strength)])))
            score, row = compare(predicted, truth)
            scores.append(score)
            rows.append({"strength": strength, **row})
    result = summary(rows, scores)
    print(json.dumps(result, indent=2))
    if arguments.json is not None:
        arguments.json.write_text(json.dumps(result, indent=2) + "\n")
    agree = result["largest_difference"]
    return 0 if max(agree["stardist_matches"], agree["cellpose_matches"]) == 0 and agree["stardist_pq"] < 1e-6 else 1


def numbered(labels: Labels) -> Labels:
    """The same objects with ids 1 to n, as cellpose needs them."""
    _, ranks = np.unique(np.append(labels, 0), return_inverse=True)
    return ranks[:-1].reshape(labels.shape)


def perturb(truth: Labels, strength: float, rng: np.random.Generator) -> Labels:
    """Warp the labels, then lose, merge, cut and make up a share of the nuclei."""
    shift = np.stack([gaussian_filter(rng.normal(size=truth.shape), 8) for _ in range(2)])
    shift *= 3 * strength / shift.std()
    labels = map_coordinates(truth, np.indices(truth.shape) + shift, order=0).astype(np.int64)
    ids = rng.permutation(np.unique(labels[labels > 0]))
    share = max(1, round(0.08 * strength * len(ids)))
    lost, merged, cut = ids[:share], ids[share : 2 * share], ids[2 * share : 3 * share]
    labels[np.isin(labels, lost)] = 0
    centres = {i: np.argwhere(labels == i).mean(axis=0) for i in ids if (labels == i).any()}
    for i in (i for i in merged if i in centres):
        nearest = min((j for j in centres if j != i), key=lambda j: np.sum((centres[j] - centres[i]) ** 2), default=i)
        labels[labels == i] = nearest
    for i in (i for i in cut if i in centres):
        below = np.arange(truth.shape[0])[:, None] > centres[i][0]
        labels[(labels == i) & below] = labels.max() + 1
    for _ in range(share):
        y, x = rng.integers(0, np.array(truth.shape) - 12)
        patch = labels[y : y + 12, x : x + 12]
        patch[patch == 0] = labels.max() + 1
    return labels


def compare(predicted: Labels, truth: Labels) -> tuple[ObjectScore, dict[str, float]]:
    """Limner's score of an image, and differences from the peers."""
    ours = {t: score_objects(predicted, truth, t) for t in THRESHOLDS}
    theirs = {t: matching(truth, predicted, thresh=t) for t in THRESHOLDS}
    _, cellpose_matches, _, _ = average_precision([truth], [predicted], threshold=list(THRESHOLDS))
    score = ours[0.5]
    at_one_half = int(np.count_nonzero(count_overlaps(predicted, truth).iou == 0.5))
    return score, {
        "stardist_matches": max(abs(ours[t].matches - int(theirs[t].tp)) for t in THRESHOLDS),
        "stardist_f1": max(abs(ours[t].f1 - theirs[t].f1) for t in THRESHOLDS),
        "cellpose_matches": max(
            abs(ours[t].matches - int(n)) for t, n in zip(THRESHOLDS, cellpose_matches[0], strict=True)
        ),
        "pairs_at_one_half": at_one_half,
        "stardist_pq": abs(score.panoptic.pq - theirs[0.5].panoptic_quality),
        "aji": score.aji,
        "aji_once": score.aji_once,
        "aji_plus": score.aji_plus,
        "cellpose_aji": float(aggregated_jaccard_index([truth], [predicted])[0]),
    }


def summary(rows: list[dict[str, float]], scores: list[ObjectScore]) -> dict[str, Any]:
    """Largest differences over all images, and the kinds of AJI by strength."""
    kinds = ("aji", "aji_once", "aji_plus", "cellpose_aji")
    # a pair at exactly one half is stardist's match and not Kirillov's: such images are counted apart
    plain = [row for row in rows if row["pairs_at_one_half"] == 0]
    largest = {name: max(row[name] for row in rows) for name in ("stardist_matches", "stardist_f1", "cellpose_matches")}
    pooled = pool_scores(scores)
    return {
        "images": len(rows),
        "true_objects": pooled.true_objects,
        "predicted_objects": pooled.predicted_objects,
        "thresholds": THRESHOLDS,
        "images_with_a_pair_at_one_half": len(rows) - len(plain),
        "largest_difference": {**largest, "stardist_pq": max(row["stardist_pq"] for row in plain)},
        "mean_by_strength": {
            str(s): {kind: round(float(np.mean([r[kind] for r in rows if r["strength"] == s])), 4) for kind in kinds}
            for s in STRENGTHS
        },
        "largest_gap_from_aji": {kind: round(max(abs(r[kind] - r["aji"]) for r in rows), 4) for kind in kinds[1:]},
        "versions": {name: importlib.metadata.version(name) for name in ("stardist", "cellpose", "numpy", "scipy")},
    }


if __name__ == "__main__":
    sys.exit(main())
