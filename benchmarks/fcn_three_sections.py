"""FCN-8s at full width on three labelled sections of the mouse stack, on a CPU: does it learn, and how fast.

    python benchmarks/fcn_three_sections.py [--steps 30] [--sections 60 70 80] [--network-pixels 136]

Trains the first stage from scratch and prints the first and last loss (each the mean of three steps) and the seconds a
step. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path

import numpy as np
import torch

from limner.intensity import to_8_bit
from limner.io import read, read_label_volume
from limner.pixel_classifier import ClassifierOptions, make_classifier
from limner.training import Schedule, train


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--sections", type=int, nargs="+", default=[60, 70, 80])
    parser.add_argument("--network-pixels", type=int, default=136)
    arguments = parser.parse_args()
    folder = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
    images = read(folder / "stpt_native_50x40x40um.nii.gz")
    labels = read_label_volume(folder / "coarse_native_50x40x40um.nii.gz", like=images)
    chosen = arguments.sections
    classifier = make_classifier(
        to_8_bit(images.pixels)[chosen][:, None],
        labels.labels[chosen],
        range(len(chosen)),
        np.asarray(images.space.section_positions)[chosen],
        ClassifierOptions(network="fcn_vgg16", network_pixels=arguments.network_pixels),
    )
    targets = torch.stack([classifier.targets(z, classifier.classes) for z in range(len(chosen))])
    groups = [
        {"params": group["params"], "scale": scale}
        for group, scale in zip(classifier.network.parameter_groups(1e-4), (1.0, 20.0), strict=True)
    ]
    began = time.perf_counter()
    losses = train(
        classifier.network,
        classifier.images,
        targets,
        Schedule(steps=arguments.steps, batch=len(chosen), rate=1e-4),
        classifier.input,
        torch.Generator().manual_seed(0),
        groups=groups,
    )
    seconds = (time.perf_counter() - began) / arguments.steps
    weights = sum(p.numel() for p in classifier.network.parameters())
    print(
        f"{weights / 1e6:.0f} M weights, {len(classifier.classes)} classes, {tuple(classifier.images.shape)} sections"
    )
    print(f"loss {np.mean(losses[:3]):.3f} -> {np.mean(losses[-3:]):.3f} in {arguments.steps} steps")
    print(f"{seconds:.1f} s a step on {torch.get_num_threads()} threads")


if __name__ == "__main__":
    main()
