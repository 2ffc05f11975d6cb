"""Seconds for one image: windows with the halo that the network asks for against the paper's windows of 256 every 128.

    python benchmarks/tiled_inference.py [--side 2000] [--window 1536] [--width 16] [--image FILE] [--out FILE]

The same network runs on the same image in each scheme in turn, `--repeats` times; the median counts. The
paper's scheme runs as published (windows are computed whole, then cut) and with Limner's saving (upwards, only what is
kept is computed). The network is trained for a few steps on the image's own dark spots, so that masks are such as
users see. The image, without `--image`: synthetic tissue with nuclei.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch
from scipy import ndimage
from torch.nn import functional as F

from limner.inference import PAPER_WINDOWS, Options, predict
from limner.networks.tiled_unet import TiledUNet
from limner.parallel import keep_freed_memory
from limner.run_record import machine, package_versions


class WholeWindows(torch.nn.Module):
    """A network that computes whole windows and cuts out the region."""

    def __init__(self, network: TiledUNet) -> None:
        super().__init__()
        self.network = network
        self.halo, self.alignment = network.halo, network.alignment

    def forward(self, image: torch.Tensor, region: tuple[slice, slice]) -> torch.Tensor:
        return self.network(image)[:, :, region[0], region[1]]


def synthetic_tissue(side: int, seed: int = 0) -> tuple[np.ndarray, np.ndarray]:
    """An 8-bit image (side, side, 3) with a nucleus on every 30 x 30 pixels, and its mask."""
    draw = np.random.default_rng(seed)
    mask = np.zeros((side, side), bool)
    for y, x in draw.integers(0, side, (side * side // 900, 2)):
        ry, rx = draw.uniform(5, 10, 2)
        top, left = max(y - 10, 0), max(x - 10, 0)
        rows, columns = np.ogrid[top : min(y + 11, side), left : min(x + 11, side)]
        mask[top : y + 11, left : x + 11] |= ((rows - y) / ry) ** 2 + ((columns - x) / rx) ** 2 < 1
    stain = ndimage.gaussian_filter(mask.astype(np.float32), 1) + 0.15 * draw.standard_normal((side, side))
    colours = np.array([225, 190, 220]) - stain[..., None] * np.array([110, 110, 60])
    return np.clip(colours, 0, 255).astype(np.uint8), mask


def trained(widths: tuple[int, ...], image: np.ndarray, mask: np.ndarray, steps: int) -> TiledUNet:
    """A network that has seen a few patches of the image."""
    torch.manual_seed(0)
    network = TiledUNet(widths=widths)
    optimiser = torch.optim.Adam(network.parameters(), lr=3e-3)
    draw = np.random.default_rng(1)
    for _ in range(steps):
        corners = draw.integers(0, max(1, min(mask.shape) - 128), (4, 2))
        patches = np.stack([image[y : y + 128, x : x + 128] for y, x in corners]).astype(np.float32) / 255
        targets = np.stack([mask[y : y + 128, x : x + 128] for y, x in corners]).astype(np.int64)
        loss = F.cross_entropy(network(torch.from_numpy(patches).permute(0, 3, 1, 2)), torch.from_numpy(targets))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return network.eval()


def run(network: TiledUNet | WholeWindows, image: np.ndarray, options: Options) -> tuple[dict[str, float], np.ndarray]:
    """Seconds, processor seconds and the probability of a nucleus, (Y, X)."""
    found = np.zeros(image.shape[:2], np.float32)

    def write(tile, probabilities):
        found[tile.core.slices] = probabilities[1][tile.core.within(tile.kept)]

    began, cpu = time.perf_counter(), time.process_time()
    grid = predict(network, image, write, options)
    spent = {"seconds": time.perf_counter() - began, "processor_seconds": time.process_time() - cpu}
    return {**spent, "windows": len(grid)}, found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--side", type=int, default=2000)
    parser.add_argument("--image", type=Path, help="an image instead of synthetic tissue; dark pixels count as nuclei")
    parser.add_argument("--window", type=int, default=Options().window)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--width", type=int, default=16, help="channels of the first level; the paper's: 64")
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/tiled_inference.json"))
    arguments = parser.parse_args()
    keep_freed_memory()  # as `limner nuclei segment` does; both schemes gain by it
    if arguments.image is None:
        image, mask = synthetic_tissue(arguments.side)
    else:
        from imageio.v3 import imread

        image = imread(arguments.image)[..., :3]
        mask = image.mean(-1) < np.quantile(image.mean(-1), 0.2)
    network = trained(tuple(arguments.width * 2**k for k in range(5)), image, mask, arguments.steps)
    paper = replace(PAPER_WINDOWS, batch=max(6, arguments.batch), device=arguments.device)
    schemes = {
        "halo": (network, Options(window=arguments.window, batch=arguments.batch, device=arguments.device)),
        "paper": (WholeWindows(network), paper),
        "paper, only what is kept": (network, paper),
    }
    runs: dict[str, list[dict[str, float]]] = {name: [] for name in schemes}
    found: dict[str, np.ndarray] = {}
    for _ in range(arguments.repeats):  # in turn, so that a busy machine slows all schemes alike
        for name, (computed, options) in schemes.items():
            spent, found[name] = run(computed, image, options)
            runs[name].append(spent)
            print(name, spent, flush=True)
    rows = {
        name: {key: float(np.median([one[key] for one in runs[name]])) for key in runs[name][0]} for name in schemes
    }
    masks = {name: probability > 0.5 for name, probability in found.items()}
    result = {
        "side": list(image.shape[:2]),
        "parameters": sum(p.numel() for p in network.parameters()),
        "rows": {name: {**row, "options": asdict(schemes[name][1])} for name, row in rows.items()},
        "repeats": arguments.repeats,
        "ratio": rows["paper"]["seconds"] / rows["halo"]["seconds"],
        "ratio_of_processor_seconds": rows["paper"]["processor_seconds"] / rows["halo"]["processor_seconds"],
        "pixels_that_differ": int((masks["halo"] != masks["paper"]).sum()),
        "largest_difference": float(np.abs(found["halo"] - found["paper"]).max()),
        "nuclei_share": float(masks["halo"].mean()),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
        "device": torch.cuda.get_device_name() if torch.cuda.is_available() and arguments.device != "cpu" else "cpu",
        "versions": package_versions(),
        "machine": machine(),
        "threads": torch.get_num_threads(),
    }
    for key in ("ratio", "ratio_of_processor_seconds", "pixels_that_differ", "largest_difference", "peak_memory_gb"):
        print(key, result[key])
    arguments.out.parent.mkdir(parents=True, exist_ok=True)
    arguments.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
