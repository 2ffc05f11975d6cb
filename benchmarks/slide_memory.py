"""Peak memory and seconds of `limner nuclei segment` on a synthetic slide that is mostly glass.

    python benchmarks/slide_memory.py [--side 20000] [--tissue 5000] [--width 16] [--out FILE]

The slide is a tiled, JPEG-compressed TIFF with a pyramid; in its middle lies a square of tissue with a nucleus on every
30 x 30 pixels. The model is trained for a few steps on a corner of it. The command runs in a process of its own.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import tifffile
from scipy import ndimage

from limner.methods.partial_nuclei import AnnotatedTile, Settings, fit, to_model
from limner.run_record import machine, package_versions
from tiled_inference import synthetic_tissue

UM_PER_PX, TILE, GLASS = 0.25, 512, 245


def tiles(side: int, tissue: np.ndarray, step: int) -> Iterator[np.ndarray]:
    """Tiles of a level, every `step`-th pixel of the slide, without the slide being in memory."""
    first = (side - len(tissue)) // 2
    small, first, side = tissue[::step, ::step], first // step, side // step
    for top in range(0, side, TILE):
        for left in range(0, side, TILE):
            tile = np.full((TILE, TILE, 3), GLASS, np.uint8)
            y0, y1 = (np.clip(n - first, 0, len(small)) for n in (top, top + TILE))
            x0, x1 = (np.clip(n - first, 0, len(small)) for n in (left, left + TILE))
            tile[y0 + first - top : y1 + first - top, x0 + first - left : x1 + first - left] = small[y0:y1, x0:x1]
            yield tile


def write_slide(path: Path, side: int, tissue: np.ndarray) -> None:
    """Levels of 1, 1/4 and 1/16 of the size."""
    with tifffile.TiffWriter(path, bigtiff=True) as file:
        for level in range(3):
            step = 4**level
            centimetre = 1e4 / (UM_PER_PX * step)
            file.write(
                tiles(side, tissue, step),
                shape=(side // step, side // step, 3),
                dtype=np.uint8,
                tile=(TILE, TILE),
                photometric="rgb",
                compression="jpeg",
                resolution=(centimetre, centimetre),
                resolutionunit="CENTIMETER",
                **({"subifds": 2} if level == 0 else {"subfiletype": 1}),
            )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--side", type=int, default=20_000)
    parser.add_argument("--tissue", type=int, default=5_000)
    parser.add_argument("--width", type=int, default=16)
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/slide_memory.json"))
    given = parser.parse_args()
    tissue, mask = synthetic_tissue(given.tissue)
    settings = Settings(width=given.width, steps=given.steps, batch=2, loss="plain")
    nuclei = ndimage.label(mask[:512, :512])[0]
    network, _ = fit([AnnotatedTile.from_labels(tissue[:512, :512], nuclei, settings)], settings)
    with tempfile.TemporaryDirectory() as folder:
        slide, model = Path(folder, "slide.tif"), Path(folder, "model.safetensors")
        to_model(network, settings, {}).write(model)
        write_slide(slide, given.side, tissue)
        limner = [sys.executable, "-c", "import sys; from limner.cli import main; sys.exit(main())"]
        began = time.monotonic()
        out = Path(folder, "out")
        command = ["nuclei", "segment", slide, model, "-o", out, "--geojson-gz"]
        subprocess.run([*limner, *map(str, command)], check=True)
        seconds = time.monotonic() - began
        found = json.loads((out / "run.json").read_text())["images"]["slide"]["count"]
    result = {
        "side": given.side,
        "tissue_side": given.tissue,
        "parameters": sum(p.numel() for p in network.parameters()),
        "true_objects": int(ndimage.label(mask)[1]),
        "nuclei": found,
        "seconds": round(seconds, 1),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1e6,
        "versions": package_versions(),
        "machine": machine(),
    }
    print({key: result[key] for key in ("nuclei", "true_objects", "seconds", "peak_memory_gb")})
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
