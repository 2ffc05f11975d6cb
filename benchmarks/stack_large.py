"""A stack of many large sections through `limner stack complete`: peak memory, seconds a stage, and what is right.

    python benchmarks/stack_large.py [--sections 200] [--pixels 10000] [--out FOLDER] [--keep]

The middle sections of the mouse stack (50 um apart) are enlarged to squares of `--pixels` RGB by cubic interpolation,
and written as TIFF (zlib); labels of every n-th are enlarged likewise from signed distances, so that borders are
smooth. With `--repeat 4` every fourth section is enlarged and stands for four in a row, by hard links: reading them
costs the same, building a quarter. The command runs in a process of its own, on one core; its memory is sampled from
/proc. Seconds are those of the processor, which other work on the machine lengthens little. Files go to `--out`, which
must lie outside the repository; they are deleted at the end unless `--keep` is given.
Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import IO

import numpy as np
import tifffile
import torch
from torch.nn import functional as F

from limner.distances import signed_distance
from limner.intensity import to_8_bit
from limner.io import read, read_label_image, read_label_volume
from limner.io.sections import border_median, centre
from limner.run_record import machine, package_versions

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data")) / "stack_stpt_mouse"
REPOSITORY = Path(__file__).resolve().parents[1]
STAIN = np.array([[1.0, 0.75, 0.85]])  # of grey 255; colours fade to black as grey does
NEAR_MM = 0.3  # around a structure in which its signed distance is enlarged
SCORED = 6  # withheld sections that are scored, at most
ONE_THREAD = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "NUMBA_NUM_THREADS"), "1")


def enlarged(plane: np.ndarray, factor: int) -> np.ndarray:
    """Float32 (y, x) -> (y factor, x factor), cubic."""
    return F.interpolate(torch.from_numpy(plane)[None, None], scale_factor=factor, mode="bicubic")[0, 0].numpy()


def enlarged_image(grey: np.ndarray, factor: int, side: int) -> np.ndarray:
    """Uint8 RGB (side, side, 3) of 8-bit grey levels (y, x)."""
    levels = np.clip(np.rint(enlarged(grey, factor)), 0, 255).astype(np.uint8)
    colours = np.rint(np.arange(256)[:, None] * STAIN).astype(np.uint8)[levels]
    return centre(colours, (side, side), border_median(colours))


def enlarged_labels(labels: np.ndarray, factor: int, side: int, spacing: tuple[float, float]) -> np.ndarray:
    """Labels (side, side): where the signed distances, enlarged by cubic interpolation, are largest."""
    shape = tuple(n * factor for n in labels.shape)
    best, found = np.full(shape, -np.inf, np.float32), np.zeros(shape, labels.dtype)
    for structure in np.unique(labels).tolist():
        distance = signed_distance(labels == structure, spacing, NEAR_MM)
        near = np.argwhere(distance > -NEAR_MM)
        rows, columns = (slice(a, b + 1) for a, b in zip(near.min(axis=0), near.max(axis=0), strict=True))
        part = tuple(slice(s.start * factor, s.stop * factor) for s in (rows, columns))
        here = enlarged(np.ascontiguousarray(distance[rows, columns]), factor)
        wins = here > best[part]
        best[part][wins] = here[wins]
        found[part][wins] = structure
    return centre(found, (side, side), 0)


class Stack:
    """The middle `sections` of the mouse stack and how they are enlarged; every `repeat`-th stands for that many."""

    def __init__(self, sections: int, side: int, repeat: int, every: int) -> None:
        images = read(DATA / "stpt_native_50x40x40um.nii.gz")
        truth = read_label_volume(DATA / "coarse_native_50x40x40um.nii.gz", like=images)
        first = (len(images.pixels) - sections) // 2
        self.source = [first + z // repeat * repeat for z in range(sections)]
        self.grey, self.truth = to_8_bit(images.pixels), truth.labels
        self.own = images.space.spacing[1:]
        self.side, self.factor = side, side // max(images.space.shape[1:])
        self.spacing = (images.space.spacing[0], *(s / self.factor for s in self.own))
        self.labelled = sorted({*range(0, sections, every), sections - 1})
        withheld = [z for z in range(sections) if z not in self.labelled]
        self.scored = withheld[:: -(-len(withheld) // SCORED)]

    def labels(self, z: int) -> np.ndarray:
        """True labels of a section at full size."""
        return enlarged_labels(self.truth[self.source[z]], self.factor, self.side, self.own)

    def build(self, images: Path, labels: Path) -> None:
        """Write all images and the labels of the labelled sections."""
        for folder in (images, labels):
            folder.mkdir(parents=True)
        built: dict[int, Path] = {}
        for z, source in enumerate(self.source):
            path = images / f"section{z:04}.tif"
            if source in built:
                os.link(built[source], path)
            else:
                built[source] = path
                write(path, enlarged_image(self.grey[source], self.factor, self.side), photometric="rgb")
        for z in self.labelled:
            write(labels / f"section{z:04}.tif", self.labels(z), photometric="minisblack")


def write(path: Path, pixels: np.ndarray, photometric: str) -> None:
    tifffile.imwrite(
        path, pixels, photometric=photometric, compression="zlib", compressionargs={"level": 1}, predictor=True
    )


def of_process(pid: int) -> tuple[float, float, float]:
    """Processor seconds so far, GB now, most GB ever."""
    times = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    status = Path(f"/proc/{pid}/status").read_text()
    now, most = (int(status.split(f"{name}:")[1].split()[0]) / 1e6 for name in ("VmRSS", "VmHWM"))
    return (int(times[11]) + int(times[12])) / os.sysconf("SC_CLK_TCK"), now, most


def watched(command: list[str]) -> dict[str, object]:
    """Run a command on one core; its peak memory, and for each stage that it tells of seconds and most memory."""
    child = subprocess.Popen(
        command, env={**os.environ, **ONE_THREAD}, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    stages: dict[str, dict[str, float]] = {}
    began, told, most, peak = time.monotonic(), [0.0], [0.0], [0.0]

    def listen(lines: IO[str]) -> None:
        for line in lines:
            print(line, end="", flush=True)
            stage, _, rest = line.partition(": ")
            done, _, total = rest.split(" (")[0].partition(" of ")
            if done.strip() != total.strip() or not done.strip().isdecimal():
                continue
            seconds = of_process(child.pid)[0]
            stages[stage] = {"cpu_seconds": round(seconds - told[0], 1), "most_gb": most[0], "of": int(total)}
            told[0], most[0] = seconds, 0.0

    assert child.stdout is not None
    listener = threading.Thread(target=listen, args=(child.stdout,))
    listener.start()
    while child.poll() is None:
        try:
            _, now, ever = of_process(child.pid)
        except (OSError, IndexError):  # it has just ended
            break
        most[0], peak[0] = max(most[0], now), max(peak[0], ever)
        time.sleep(0.2)
    child.wait()
    listener.join()
    if child.returncode:
        sys.exit(f"limner ended with {child.returncode}")
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    seconds = used.ru_utime + used.ru_stime
    stages["hashing, areas, writing"] = {"cpu_seconds": round(seconds - told[0], 1), "most_gb": most[0]}
    return {
        "peak_gb": peak[0],
        "cpu_seconds": round(seconds, 1),
        "wall_seconds": round(time.monotonic() - began, 1),
        "stages": stages,
    }


def right(stack: Stack, made: Path) -> list[float]:
    """Share of the structures' pixels that are right at full size, on the scored sections."""
    shares = []
    for z in stack.scored:
        truth = stack.labels(z)
        shares.append(float((read_label_image(made / f"section{z:04}.png") == truth)[truth > 0].mean()))
    return shares


def megabytes(folder: Path) -> float:
    """Of the files of a folder, each once however many links it has."""
    found = {f.stat().st_ino: f.stat().st_size for f in folder.rglob("*") if f.is_file()}
    return sum(found.values()) / 1e6


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sections", type=int, default=200)
    parser.add_argument("--pixels", type=int, default=10_000, help="side of a section")
    parser.add_argument("--repeat", type=int, default=1, help="sections in a row that one enlarged section stands for")
    parser.add_argument("--every", type=int, default=10, help="every n-th section is labelled, and the last")
    parser.add_argument("--working-um", type=float, help="as of `limner stack complete`; default: its own choice")
    parser.add_argument("--out", type=Path, help="where the stack is built; default: a temporary folder")
    parser.add_argument("--keep", action="store_true", help="do not delete the stack and the results")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/stack_large.json"))
    given = parser.parse_args()
    if not DATA.is_dir():
        sys.exit(f"skipped: no data at {DATA}")
    folder = Path(tempfile.mkdtemp()) if given.out is None else given.out.resolve()
    if folder.is_relative_to(REPOSITORY):
        sys.exit(f"--out: {folder} lies in the repository; name a folder elsewhere")
    torch.set_num_threads(1)
    stack = Stack(given.sections, given.pixels, given.repeat, given.every)
    began = time.process_time()
    stack.build(folder / "images", folder / "labels")
    building = time.process_time() - began
    print(f"built in {building:.0f} s: {megabytes(folder):.0f} MB", flush=True)
    command = [sys.executable, "-m", "limner", "stack", "complete", str(folder / "images"), str(folder / "labels")]
    command += ["-o", str(folder / "completed"), "--method", "fusion", "--jobs", "1", "--device", "cpu"]
    command += ["--spacing", ",".join(f"{s:.9g}" for s in stack.spacing)]
    command += [] if given.working_um is None else ["--working-um", str(given.working_um)]
    run = watched(command)
    began = time.process_time()
    shares = right(stack, folder / "completed" / "labels")
    result = {
        "sections": given.sections,
        "pixels": given.pixels,
        "repeat": given.repeat,
        "every": given.every,
        "working_um": json.loads((folder / "completed" / "run.json").read_text())["settings"].get("working_um"),
        "built_mb": {name: round(megabytes(folder / name), 1) for name in ("images", "labels", "completed")},
        "building_cpu_seconds": round(building, 1),
        "scoring_cpu_seconds": round(time.process_time() - began, 1),
        **run,
        "right": {"sections": stack.scored, "each": shares, "mean": float(np.mean(shares)), "least": min(shares)},
        "versions": package_versions(),
        "machine": machine(),
    }
    print(json.dumps(result))
    given.json.parent.mkdir(parents=True, exist_ok=True)
    given.json.write_text(json.dumps(result, indent=1) + "\n")
    if not given.keep:
        shutil.rmtree(folder)


if __name__ == "__main__":
    main()
