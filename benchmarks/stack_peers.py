"""Peers of stack completion and of its registration, in an environment of their own (make bench-peers).

    .venv-peers/bin/python benchmarks/stack_peers.py PEER FOLDER ITEM ...

Called by stack_completion.py and stack_registration.py; Limner is not imported. FOLDER/in.npz holds what a peer may
see. For each item (a section, or a pair of sections) FOLDER/PEER/ITEM.npz is written as soon as it is made, with the
seconds that it took and the most memory that the process held so far; what is there is not made again, so that a
stopped run goes on.

Stacks: `levels` (Z, Y, X), 8-bit grey levels; `labels` (Z, Y, X), 0 on unlabelled sections; `labelled`; `spacing`
(z, y, x), mm. Pairs: `fixed` and `moving` (N, Y, X), `spacing` (y, x), mm.
"""

from __future__ import annotations

import json
import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from scipy import ndimage
from scipy.special import logsumexp

Arrays = dict[str, np.ndarray]
RHO, SIGMA, ALPHA, CLIP_MM = 21.0, 20.0, 1.0, 1.0  # the paper's, per mm, grey levels, per mm; distances beyond are cut
SEED = 1
SYN_CC = {"type_of_transform": "SyN", "syn_metric": "CC", "syn_sampling": 4, "reg_iterations": (40, 20, 0)}
TRANSFORMS: dict[str, dict[str, Any]] = {
    "affine": {"type_of_transform": "Affine"},
    "syn": {"type_of_transform": "SyN"},  # mutual information, 40, 20, 0 iterations
    "syncc": SYN_CC,
    "syncc_preset": {"type_of_transform": "SyNCC"},  # 2100, 1200, 1200, 20 iterations
}
UNET_CPU_SECONDS = 15 * 60  # about what Limner's gem takes in all
UNET_WIDTH, UNET_BATCH = 16, 2
LNCC_SIGMA = 5.0  # of NiftyReg, pixels
PIECE = (slice(40, 136), slice(70, 198))  # rows and columns of the piece that Biomedisa is given


# ---- fusion ---------------------------------------------------------------------------------------------------------


def signed_distance(mask: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Distance of pixel centres to a structure's border, mm, positive inside, clipped; pixels are square."""
    if mask.all() or not mask.any():
        return np.full(mask.shape, CLIP_MM if mask.all() else -CLIP_MM)
    half = min(spacing) / 2
    inside = ndimage.distance_transform_edt(mask, spacing) - half
    outside = ndimage.distance_transform_edt(~mask, spacing) - half
    return np.clip(np.where(mask, inside, -outside), -CLIP_MM, CLIP_MM)


def distances(labels: list[np.ndarray], spacing: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    """Structures (L,) that occur on any of N label maps, background among them, and distances to them (N, L, Y, X)."""
    structures = np.unique([0, *np.unique(np.stack(labels))])
    return structures, np.stack([[signed_distance(m == s, spacing) for s in structures] for m in labels])


def mixture(
    found: np.ndarray, levels: np.ndarray, section: np.ndarray, gaps_mm: np.ndarray, normalised: bool
) -> np.ndarray:
    """log p_f (L, Y, X) up to a constant a pixel: the paper's Eq. 4 as printed, or with each atlas's odds normalised.

    Of signed distances (N, L, Y, X), atlases' grey levels (N, Y, X), those of the section, and gaps along z, mm.
    """
    log_weights = -ALPHA * gaps_mm[:, None, None] - (levels - section) ** 2 / (2 * SIGMA**2)
    odds = RHO * found
    if normalised:
        odds = odds - logsumexp(odds, axis=1, keepdims=True)
    return logsumexp(log_weights[:, None] + odds, axis=0)


def blend(found: np.ndarray, gaps_mm: np.ndarray) -> np.ndarray:
    """Signed distances of one or two atlases, blended linearly in z, (L, Y, X)."""
    weights = gaps_mm[::-1] / gaps_mm.sum() if len(gaps_mm) == 2 else np.ones(1)
    return np.tensordot(weights, found, axes=1)


# ---- stacks ---------------------------------------------------------------------------------------------------------


class Stack:
    """What a peer may see of a stack; see the head of this file."""

    def __init__(self, arrays: Arrays) -> None:
        self.levels, self.labels = arrays["levels"], arrays["labels"]
        self.labelled: list[int] = arrays["labelled"].tolist()
        self.spacing = tuple(arrays["spacing"].tolist())
        self.plane = (self.spacing[1], self.spacing[2])

    def neighbours(self, z: int) -> list[int]:
        """The labelled sections before and after `z`."""
        before, after = [a for a in self.labelled if a < z], [a for a in self.labelled if a > z]
        return before[-1:] + after[:1]

    def gaps_mm(self, z: int, atlases: list[int]) -> np.ndarray:
        return self.spacing[0] * np.abs(np.asarray(atlases) - z)


def ants_image(pixels: np.ndarray, spacing: tuple[float, float]) -> Any:
    import ants

    return ants.from_numpy(np.ascontiguousarray(pixels, np.float32), spacing=spacing)


def moved(stack: Stack, z: int, atlas: int, kind: str) -> tuple[np.ndarray, np.ndarray]:
    """Grey levels and labels of a labelled section, registered onto section `z`."""
    import ants

    fixed, moving, labels = (
        ants_image(p, stack.plane) for p in (stack.levels[z], stack.levels[atlas], stack.labels[atlas])
    )
    with tempfile.TemporaryDirectory() as folder:
        found = ants.registration(fixed, moving, outprefix=f"{folder}/", random_seed=SEED, **TRANSFORMS[kind])
        image = ants.apply_transforms(fixed, moving, found["fwdtransforms"])
        carried = ants.apply_transforms(fixed, labels, found["fwdtransforms"], interpolator="nearestNeighbor")
    return image.numpy(), carried.numpy().astype(stack.labels.dtype)


def affine(stack: Stack, _: Path) -> Callable[[int], Arrays]:
    """Linear interpolation of signed distances after affine registration of both neighbours."""

    def one(z: int) -> Arrays:
        atlases = stack.neighbours(z)
        structures, found = distances([moved(stack, z, a, "affine")[1] for a in atlases], stack.plane)
        return {"labels": structures[blend(found, stack.gaps_mm(z, atlases)).argmax(axis=0)]}

    return one


def syncc(stack: Stack, _: Path) -> Callable[[int], Arrays]:
    """SyN-CC of both neighbours and three fusions."""

    def one(z: int) -> Arrays:
        atlases = stack.neighbours(z)
        levels, labels = zip(*(moved(stack, z, a, "syncc") for a in atlases), strict=True)
        gaps = stack.gaps_mm(z, atlases)
        structures, found = distances(list(labels), stack.plane)
        given = (found, np.stack(levels), stack.levels[z], gaps)
        evidence = {
            "printed": mixture(*given, False),
            "normalised": mixture(*given, True),
            "blended": blend(found, gaps),
        }
        return {name: structures[e.argmax(axis=0)] for name, e in evidence.items()}

    return one


def joint_label_fusion(stack: Stack, _: Path) -> Callable[[int], Arrays]:
    """ANTs joint label fusion of both neighbours after SyN-CC, with its default settings.

    Four labelled sections were tried and were worse on all of three sections (.942 / .913 / .830 against .954 / .929 /
    .861 of the pixels right).
    """
    import ants

    def one(z: int) -> Arrays:
        pairs = [moved(stack, z, a, "syncc") for a in stack.neighbours(z)]
        # background takes part in the vote as a label of its own; where all atlases agree there is nothing to vote on
        maps = [labels.astype(int) + 1 for _, labels in pairs]
        unsure = np.any([m != maps[0] for m in maps], axis=0)
        labels = maps[0]
        if unsure.any():
            images = [ants_image(p, stack.plane) for p in (stack.levels[z], *(levels for levels, _ in pairs))]
            mask, *votes = (ants_image(m, stack.plane) for m in (unsure, *maps))
            found = ants.joint_label_fusion(images[0], mask, images[1:], label_list=votes)
            labels = np.where(unsure, found["segmentation"].numpy().astype(int), labels)
        return {"labels": (labels - 1).clip(min=0)}

    return one


def filled(section: np.ndarray, spacing: tuple[float, float]) -> np.ndarray:
    """Zeros become the nearest other value in mm, in (Y, X); a section of zeros stays as it is."""
    if not section.any():
        return section
    nearest = ndimage.distance_transform_edt(section == 0, spacing, return_distances=False, return_indices=True)
    return section[tuple(nearest)]


def morphological(stack: Stack, _: Path) -> Callable[[int], Arrays]:
    """ITK morphological contour interpolation of the whole stack, with background as a structure of its own.

    With its defaults the filter leaves pixels that no structure reaches as background, holes where structures part
    from each other on the way, and it drops at once a structure that ends at the next labelled section: median
    accuracy .872 at every 10th section, and worse than copying beside a label. So it is told that every labelled
    section is one (structures that end shrink towards the next one: mean .866 for .863), background is interpolated
    too, and what none reaches gets the nearest structure: median .892, mean .880. Where two reach a pixel the
    filter takes the higher label; background is the lowest. 16 bits, since it counts tenths of a pixel of distance in
    the pixels' type, and 8 end at 25 pixels. Distance transform, cross and heuristic alignment are its defaults;
    dilations and exhaustive alignment were stopped unfinished after several minutes. Whole stack or gap by gap makes
    little difference (mean .862, .863). Chosen on the sections that are scored, to the advantage of this row.
    """
    import itk

    shifted = np.zeros(stack.labels.shape, np.int16)
    shifted[stack.labelled] = stack.labels[stack.labelled].astype(np.int16) + 1  # 0: no label, 1: background
    interpolator = itk.MorphologicalContourInterpolator.New(
        itk.image_from_array(shifted), Axis=2, UseCustomSlicePositions=True
    )
    for label in np.unique(shifted)[1:].tolist():
        interpolator.SetLabeledSliceIndices(2, label, stack.labelled)
    interpolator.Update()
    found = itk.array_from_image(interpolator.GetOutput())
    return lambda z: {"labels": (filled(found[z], stack.plane) - 1).clip(min=0)}


def biomedisa(stack: Stack, _: Path) -> Callable[[int], Arrays]:
    """Biomedisa's smart interpolation with its defaults, of the piece; background elsewhere. Its labels hold no 0."""
    from biomedisa.interpolation import smart_interpolation

    first, last = stack.labelled[0], stack.labelled[-1] + 1
    window = (slice(first, last), *PIECE)
    # without a GPU, by OpenCL on the processor: pocl's platform is called Portable Computing Language
    platform = None if os.environ.get("BIOMEDISA_GPU") else "opencl_Portable_CPU"
    found = smart_interpolation(stack.levels[window].copy(), stack.labels[window].copy(), platform=platform)
    whole = np.zeros_like(stack.labels)
    whole[window] = found["regular"]
    return lambda z: {"labels": whole[z]}


# ---- a plain U-Net --------------------------------------------------------------------------------------------------


def unet(stack: Stack, folder: Path) -> Callable[[int], Arrays]:
    """A plain 2D U-Net trained on the labelled sections for a fixed time of the processor."""
    import torch
    from torch import nn
    from torch.nn import functional as F

    torch.manual_seed(SEED)
    draw = np.random.default_rng(SEED)
    classes = np.unique(stack.labels[stack.labelled])

    def block(i: int, o: int) -> nn.Module:
        layers = [m for c in (i, o) for m in (nn.Conv2d(c, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())]
        return nn.Sequential(*layers)

    class UNet(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            widths = [UNET_WIDTH * 2**i for i in range(4)]
            self.down = nn.ModuleList(block(i, o) for i, o in zip([1, *widths], widths, strict=False))
            self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in widths[-2::-1])
            self.join = nn.ModuleList(block(2 * w, w) for w in widths[-2::-1])
            self.last = nn.Conv2d(widths[0], len(classes), 1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            passed = []
            for i, layer in enumerate(self.down):
                x = layer(F.max_pool2d(x, 2) if i else x)
                passed.append(x)
            for up, join, skip in zip(self.up, self.join, passed[-2::-1], strict=True):
                x = join(torch.cat([up(x), skip], dim=1))
            return self.last(x)

    height, width = stack.levels.shape[1:]
    padding = (0, -width % 8, 0, -height % 8)
    images = F.pad(torch.from_numpy(stack.levels)[:, None] / 255, padding)
    indices = np.searchsorted(classes, stack.labels[stack.labelled])
    targets = F.pad(torch.from_numpy(indices)[:, None].float(), padding)
    known = images[stack.labelled]
    network, weights = UNet(), folder / "weights.pt"

    def augmented() -> tuple[torch.Tensor, torch.Tensor]:
        """Turned up to 10 degrees, moved up to 5 %, scaled up to 10 %, brighter or darker by up to 20 %."""
        chosen = draw.integers(len(known), size=UNET_BATCH)
        angle, scale = np.radians(draw.uniform(-10, 10, UNET_BATCH)), draw.uniform(0.9, 1.1, UNET_BATCH)
        ratio = images.shape[2] / images.shape[3]
        cos, sin = scale * np.cos(angle), scale * np.sin(angle)
        shift = draw.uniform(-0.1, 0.1, (2, UNET_BATCH))  # of half the size
        matrix = np.array([[cos, -sin * ratio, shift[0]], [sin / ratio, cos, shift[1]]]).transpose(2, 0, 1)
        grid = F.affine_grid(torch.from_numpy(matrix).float(), [UNET_BATCH, 1, *images.shape[2:]], align_corners=False)
        bright = torch.from_numpy(draw.uniform(0.8, 1.2, (UNET_BATCH, 1, 1, 1))).float()
        turned = F.grid_sample(known[chosen], grid, align_corners=False) * bright
        return turned, F.grid_sample(targets[chosen], grid, mode="nearest", align_corners=False)[:, 0].long()

    if weights.exists():
        network.load_state_dict(torch.load(weights))
    else:
        optimiser = torch.optim.AdamW(network.parameters(), lr=1e-3)
        began, steps, share = time.process_time(), 0, 0.0
        while share < 1:
            for group in optimiser.param_groups:
                group["lr"] = 1e-3 * (1 - share) ** 0.9
            inputs, wanted = augmented()
            optimiser.zero_grad()
            F.cross_entropy(network(inputs), wanted).backward()
            optimiser.step()
            steps += 1
            share = (time.process_time() - began) / UNET_CPU_SECONDS
        print(f"U-Net: {steps} steps of {UNET_BATCH} sections", flush=True)
        torch.save(network.state_dict(), weights)
    network.eval()

    def one(z: int) -> Arrays:
        with torch.no_grad():
            best = network(images[[z]])[0, :, :height, :width].argmax(dim=0)
        return {"labels": classes[best.numpy()]}

    return one


# ---- registration alone ---------------------------------------------------------------------------------------------


def by_ants(kind: str) -> Callable[[Arrays, Path], Callable[[int], Arrays]]:
    def prepared(given: Arrays, _: Path) -> Callable[[int], Arrays]:
        import ants

        plane = tuple(given["spacing"].tolist())

        def one(pair: int) -> Arrays:
            fixed, moving = (ants_image(given[name][pair], plane) for name in ("fixed", "moving"))
            with tempfile.TemporaryDirectory() as folder:
                out = f"{folder}/"
                found = ants.registration(fixed, moving, outprefix=out, random_seed=SEED, **TRANSFORMS[kind])
                transforms = found["fwdtransforms"]
                field = ants.image_read(ants.apply_transforms(fixed, moving, transforms, compose=f"{out}whole"))
            return {"displacement": np.moveaxis(field.numpy(), -1, 0)}  # the first axis of the array comes first

        return one

    return prepared


def niftyreg(given: Arrays, _: Path) -> Callable[[int], Arrays]:
    """reg_aladin, then reg_f3d -vel --lncc, with their defaults."""
    import nibabel

    programs = Path(sys.prefix, "niftyreg")
    step_y, step_x = given["spacing"].tolist()

    def run(*command: object) -> None:
        subprocess.run([str(programs / str(command[0])), *map(str, command[1:])], check=True, capture_output=True)

    def one(pair: int) -> Arrays:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            paths = {n: folder / f"{n}.nii" for n in ("fixed", "moving", "warped", "grid", "whole")}
            for n in ("fixed", "moving"):
                pixels = given[n][pair].T.astype(np.float32)
                nibabel.save(nibabel.Nifti1Image(pixels, np.diag([step_x, step_y, 1, 1])), paths[n])
            sides = ("-ref", paths["fixed"], "-flo", paths["moving"], "-res", paths["warped"], "-omp", 1)
            run("reg_aladin", *sides, "-aff", folder / "affine.txt")
            start = ("-aff", folder / "affine.txt", "-cpp", paths["grid"])
            run("reg_f3d", *sides, *start, "-vel", "--lncc", LNCC_SIGMA)
            run("reg_transform", "-ref", paths["fixed"], "-disp", paths["grid"], paths["whole"])
            field = np.asarray(nibabel.load(paths["whole"]).dataobj)  # (X, Y, 1, 1, 2): along x, along y
        return {"displacement": np.stack([field[:, :, 0, 0, 1].T, field[:, :, 0, 0, 0].T])}

    return one


STACK_PEERS = {
    "affine": affine,
    "syncc": syncc,
    "joint_label_fusion": joint_label_fusion,
    "morphological": morphological,
    "biomedisa": biomedisa,
    "unet": unet,
}
PAIR_PEERS = {**{f"ants_{kind}": by_ants(kind) for kind in TRANSFORMS}, "niftyreg": niftyreg}


# ---- one process a peer ---------------------------------------------------------------------------------------------


def peak_mb() -> float:
    """The most memory that this process or a program that it ran held, MB.

    getrusage would count what the process that started this one held.
    """
    own = int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0])
    return max(own, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss) / 1e3


def cpu_seconds() -> float:
    """Of this process and of those it started."""
    return sum(os.times()[:4])


def timed(make: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    began, cpu = time.perf_counter(), cpu_seconds()
    made = make()
    return made, {"seconds": time.perf_counter() - began, "cpu_seconds": cpu_seconds() - cpu, "peak_mb": peak_mb()}


def write(path: Path, arrays: Arrays) -> None:
    """Store arrays under a temporary name, then rename."""
    partial = path.with_suffix(".part.npz")
    np.savez_compressed(partial, **arrays)
    partial.replace(path)


def small(arrays: Arrays) -> Arrays:
    """Labels and displacements in types that take little room."""
    return {n: a.astype(np.float32 if a.dtype.kind == "f" else np.uint16) for n, a in arrays.items()}


def main() -> None:
    peer, folder, items = sys.argv[1], Path(sys.argv[2]), [int(item) for item in sys.argv[3:]]
    out = folder / peer
    out.mkdir(parents=True, exist_ok=True)
    missing = [i for i in items if not (out / f"{i:04}.npz").exists()]
    if not missing:
        return
    with np.load(folder / "in.npz") as file:
        arrays = {name: file[name] for name in file.files}
    trained = (out / "weights.pt").exists() and (out / "prepared.json").exists()
    if peer in STACK_PEERS:
        stack = Stack(arrays)
        one, cost = timed(lambda: STACK_PEERS[peer](stack, out))
    else:
        one, cost = timed(lambda: PAIR_PEERS[peer](arrays, out))
    if not trained:
        (out / "prepared.json").write_text(json.dumps(cost))
    for item in missing:
        made, cost = timed(lambda item=item: one(item))
        write(out / f"{item:04}.npz", {**small(made), **{n: np.float64(v) for n, v in cost.items()}})
        print(peer, item, {name: round(value, 2) for name, value in cost.items()}, flush=True)


if __name__ == "__main__":
    main()
