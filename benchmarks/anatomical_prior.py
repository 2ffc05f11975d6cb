"""Structures of scans that nobody labelled, found from label maps of other subjects: Dice and seconds.

    python benchmarks/anatomical_prior.py [--data human mouse] [--scans N] [--steps N] [--out FILE]

`human`: the 15 scans of `human_t1` with the 20 label maps of `human_labelmaps`, aligned to `human_template` at 2 mm, 12
structures with left and right together; all that holds fluid is one tissue (`--tissues`). Rows for each scan: the
location prior alone after affine alignment; EM with that prior, each structure a tissue of its own and with the fluid;
the decoder's likeliest labels (the paper's result); these refined, by the decoder alone and tempered by the location
prior; all that again with codes found for each scan anew, of which the last is the default; and from the decoder on
without tissues, with the paper's own decoder, with its bound, and on scans whose contrast is inverted. `mouse`: label
maps of ten animals of `mouse_mri`, scans of five others, 37 structures, no tissues. The scans' labels are for the score
alone; docs/benchmarks.md says which settings were tried on five of the scans looking at it. Dice is on each scan's own
grid; the two human protocols draw borders differently, so it cannot reach 1.

Alignments and trained models are kept in bench-out/anatomical_prior, and a stopped run goes on with the first row that
is missing. Seconds are those of one processor core. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import os
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limner.aligned_scan import AlignedScan, place, spread
from limner.cli.prior_fit import ALGORITHM as FIT
from limner.io import read, read_label_volume
from limner.label_map_prior import BrainMap, Prior, Settings, fit
from limner.label_merging import Merging, each_label
from limner.methods.anatomical_prior import (
    TASK,
    ImageModel,
    Inference,
    decoded,
    fit_encoder,
    from_model,
    in_brain,
    own_codes,
    refinement,
    tempered,
    to_model,
)
from limner.metrics.pixels import dice
from limner.model_file import read_model
from limner.registration.template import Template, find_brain, make_template
from limner.registration.volume_affine import Alignment, align, align_labels, read_alignment
from limner.registration.volume_transform import covered, resample
from limner.run_record import content_key, machine, package_versions
from limner.volume import LabelMap, Volume

DATA = Path(os.environ.get("LIMNER_DATA", "../shared/data"))
KEPT = Path("bench-out/anatomical_prior")
OTHERS = {
    "background": range(500, 531),
    "cerebral white matter": (25, 57),  # lesions in it
    "cerebrospinal fluid": (14, 15, 24, 72),
    "other": (26, 28, 30, 58, 60, 62, 80, 85, 136, 137, 163, 164),
}
SPACING_MM = {"human": 2.0, "mouse": 0.2}
MAPS_OF_MICE = slice(0, 10)
PAPER = {"bends": False, "coarse": 0}
FLUID = ("background", "lateral ventricles (with inferior horns)", "cerebrospinal fluid")


@dataclass(frozen=True)
class Problem:
    """Label maps on the template's grid, scans on theirs and it, and what is true.

    Parameters
    ----------
    template, merging, maps, scans : as `fit` and `fit_encoder` take them; scans by name.
    truths : list of ndarray of int
        Classes of each scan on its own grid, those of `merging` that are scored.
    scored : tuple of int
        Classes whose Dice is told.
    tissues : list of int or None
        The tissue of each class.
    """

    template: Template
    merging: Merging
    maps: list[BrainMap]
    scans: dict[str, AlignedScan]
    truths: list[NDArray[np.integer]]
    scored: tuple[int, ...]
    tissues: list[int] | None = None

    @property
    def of_labels(self) -> torch.Tensor:
        """The tissue of each class; its own where there are none."""
        return torch.tensor(self.tissues or list(range(len(self.merging.names))))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=["human", "mouse"], default=["human", "mouse"])
    parser.add_argument("--variants", nargs="+", choices=list(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--scans", type=int, default=15)
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the prior")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/anatomical_prior.json"))
    given = parser.parse_args()
    if not (DATA / "human_t1").is_dir():
        print(f"skipped: no data at {DATA}")
        return
    torch.set_num_threads(1)
    KEPT.mkdir(parents=True, exist_ok=True)
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for data in given.data:
        problem = None
        for variant in given.variants if data == "human" else ("default",):
            key = {"data": data, "variant": variant, "scans": given.scans, "steps": given.steps}
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            problem = problem or PROBLEMS[data](given.scans)
            rows += [{**key, **row} for row in VARIANTS[variant](problem, data, given.steps)]
            about = {"versions": package_versions(), "machine": machine()}
            given.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


# ---- what is compared ------------------------------------------------------------------------------------------------


def default(problem: Problem, data: str, steps: int) -> Iterator[dict[str, Any]]:
    """All that Limner does, and what needs no network."""
    settings = Settings(steps=steps)
    prior, seconds = trained(problem, data, settings)
    for name, scan, truth in each(problem):
        location = in_brain(prior.location, prior, scan)
        yield row(problem, "location prior", name, location, scan, truth)
        own = torch.arange(len(problem.merging.names))
        for what, tissues in (("EM", own), ("EM with tissues", problem.of_labels)):
            if what == "EM" or problem.tissues:
                began = time.process_time()
                found = refinement(location, scan, Inference(), tissues)[0](location)
                took = time.process_time() - began
                yield row(problem, f"location prior, {what}", name, found, scan, truth, seconds=took)
    yield from explained(problem, prior, Inference(), "", {"prior_seconds": seconds})


def paper_decoder(problem: Problem, data: str, steps: int) -> Iterator[dict[str, Any]]:
    """The paper's decoder: scores alone, at full size."""
    prior, seconds = trained(problem, data, Settings(steps=steps, **PAPER))
    yield from explained(problem, prior, Inference(), "the paper's decoder: ", {"prior_seconds": seconds})


def no_tissues(problem: Problem, data: str, steps: int) -> Iterator[dict[str, Any]]:
    """Each structure a tissue of its own."""
    prior, _ = trained(problem, data, Settings(steps=steps))
    yield from explained(replace(problem, tissues=None), prior, Inference(), "no tissues: ", {})


def bound(problem: Problem, data: str, steps: int) -> Iterator[dict[str, Any]]:
    """The paper's bound."""
    prior, _ = trained(problem, data, Settings(steps=steps))
    yield from explained(problem, prior, Inference(bound=True), "the paper's bound: ", {})


def inverted(problem: Problem, data: str, steps: int) -> Iterator[dict[str, Any]]:
    """Scans whose contrast a decreasing map turned around: dark white matter, bright fluid."""
    prior, _ = trained(problem, data, Settings(steps=steps))
    scans: dict[str, AlignedScan] = {}
    for name, scan in problem.scans.items():
        other = turned_around(scan)
        alignment = kept(f"inverted-{name}", problem.template, lambda other=other: align(other, problem.template))
        assert not alignment.failed, alignment.failed
        scans[name] = place(other, alignment, problem.template, scan.brain)
    yield from explained(replace(problem, scans=scans), prior, Inference(), "inverted contrast: ", {})


VARIANTS = {
    "default": default,
    "no tissues": no_tissues,
    "inverted": inverted,
    "paper's decoder": paper_decoder,
    "paper's bound": bound,
}


def turned_around(scan: AlignedScan) -> Volume:
    """x -> high exp(-x / middle) within the brain: what is dark becomes bright, by no straight line."""
    pixels = scan.volume.pixels.astype(np.float32)
    middle, high = np.median(pixels[scan.brain]), np.percentile(pixels[scan.brain], 99.5)
    return replace(scan.volume, pixels=np.where(scan.brain, high * np.exp(-pixels / middle), 0).astype(np.float32))


def explained(
    problem: Problem, prior: Prior, inference: Inference, prefix: str, more: dict[str, Any]
) -> Iterator[dict[str, Any]]:
    """Rows of the decoder's own labels and of these refined, by an encoder fitted to the problem's scans.

    With the codes that the encoder reads, and with each scan's own.
    """
    began = time.process_time()
    model, losses = fit_encoder(list(problem.scans.values()), prior, inference, tissues=problem.tissues)
    more |= {"encoder_seconds": time.process_time() - began, "losses": [losses[0], losses[-1]]}
    for name, scan, truth in each(problem):
        for codes, steps in (("decoder", 0), ("decoder, own codes", inference.own_steps)):
            began = time.process_time()
            found = decoder_alone(scan, prior, model, replace(inference, own_steps=steps))
            first = time.process_time() - began
            yield row(problem, f"{prefix}{codes}", name, found, scan, truth, seconds=first, **more)
            location = in_brain(prior.location, prior, scan)
            for what, share in (("refined by itself", 0.0), ("refined", inference.location_share)):
                began = time.process_time()
                mixed = tempered(found, location, share)
                result = refinement(mixed, scan, inference, problem.of_labels)[0](mixed)
                took = first + time.process_time() - began
                yield row(problem, f"{prefix}{codes}, {what}", name, result, scan, truth, seconds=took, **more)


def decoder_alone(scan: AlignedScan, prior: Prior, model: ImageModel, inference: Inference) -> torch.Tensor:
    return in_brain(next(decoded(prior, own_codes(scan, prior, model, inference), 0, 0)), prior, scan)


def trained(problem: Problem, data: str, settings: Settings) -> tuple[Prior, float]:
    """The prior and the seconds it took, from an earlier run where there is one."""
    key = content_key(FIT, vars(settings), problem.template.pixels, *(brain.classes for brain in problem.maps))
    file = KEPT / f"prior_{data}_{key[:8]}.safetensors"
    if not file.exists():
        began = time.process_time()

        def tell(step: int, steps: int) -> None:
            if step % 100 == 0:
                print(f"prior: {step} of {steps}, {time.process_time() - began:.0f} s", flush=True)

        prior, losses = fit(problem.maps, problem.template, problem.merging, settings, progress=tell)
        to_model(prior, {"seconds": time.process_time() - began, "losses": losses[-20:]}).write(file)
    read_back = read_model(file, TASK)
    return from_model(read_back)[0], read_back.record["seconds"]


def each(problem: Problem) -> Iterator[tuple[str, AlignedScan, NDArray[np.integer]]]:
    for (name, scan), truth in zip(problem.scans.items(), problem.truths, strict=True):
        yield name, scan, truth


def row(
    problem: Problem,
    step: str,
    name: str,
    probabilities: torch.Tensor,
    scan: AlignedScan,
    truth: NDArray[np.integer],
    **more: Any,
) -> dict[str, Any]:
    """Scores of a scan's likeliest labels."""
    found = spread(probabilities.argmax(dim=0).numpy(), scan.brain)
    scores = {problem.merging.names[i]: dice(found, truth, i) for i in problem.scored}
    print(f"{step}, {name}: {np.mean(list(scores.values())):.3f}", flush=True)
    return {"step": step, "scan": name, "mean_dice": float(np.mean(list(scores.values()))), "dice": scores, **more}


# ---- data -----------------------------------------------------------------------------------------------------------


def human(n_scans: int) -> Problem:
    template = make_template(read(DATA / "human_template/mni_icbm152_t1_tal_nlin_sym_09a_converted.nii.gz"))
    merging, truth = structures()
    paths = sorted((DATA / "human_labelmaps/labels_1mm").glob("*.nii.gz"))
    scans = placed(sorted((DATA / "human_t1/t1_2mm").glob("*.nii.gz"))[:n_scans], template)
    truths = [
        truth.to_classes(read_label_volume(DATA / "human_t1/labels_2mm" / name, scan.volume).labels)
        for name, scan in scans.items()
    ]
    tissues = [0 if name in FLUID else i for i, name in enumerate(merging.names)]
    tissues = [sorted(set(tissues)).index(tissue) for tissue in tissues]
    maps = aligned_maps(paths, merging, template)
    return Problem(template, merging, maps, scans, truths, tuple(range(1, 13)), tissues)


def structures() -> tuple[Merging, Merging]:
    """The 12 structures and what else there is, in the label maps' numbers; and the 12 in the scans' own numbers."""
    table = json.loads((DATA / "human_t1/structures.json").read_text())
    names = [name for name in table if not name.startswith("_")]
    members = {"background": [0], **{name: list(table[name]["freesurfer"]) for name in names}}
    for name, labels in OTHERS.items():
        members.setdefault(name, []).extend(labels)
    of_scans = {name: tuple(table[name]["neuromorphometrics"]) for name in names}
    rest = tuple(sorted(set(range(256)) - {n for labels in of_scans.values() for n in labels} - {0}))
    return (
        Merging(tuple((name, tuple(labels)) for name, labels in members.items())),
        Merging((("background", (0, *rest)), *of_scans.items())),
    )


def mouse(n_scans: int) -> Problem:
    """Ten animals give label maps, five scans; the template is the scan of median brain, whose labels take no part."""
    images = sorted((DATA / "mouse_mri/images").glob("*.nii.gz"))
    maps = [DATA / "mouse_mri/labels" / path.name for path in images[MAPS_OF_MICE]]
    merging = each_label({int(n) for path in maps for n in read_label_volume(path).present})
    of_others = [path for path in images if path.name not in {m.name for m in maps}]
    by_size = sorted((read(path) for path in of_others), key=lambda scan: int(find_brain(scan.pixels).sum()))
    template = make_template(by_size[len(by_size) // 2], SPACING_MM["mouse"])
    scans = placed(of_others[:n_scans], template)
    truths = [
        merging.to_classes(read_label_volume(DATA / "mouse_mri/labels" / name, scan.volume).labels)
        for name, scan in scans.items()
    ]
    return Problem(
        template, merging, aligned_maps(maps, merging, template), scans, truths, tuple(range(1, len(merging.names)))
    )


PROBLEMS = {"human": human, "mouse": mouse}


def placed(paths: Sequence[Path], template: Template) -> dict[str, AlignedScan]:
    scans: dict[str, AlignedScan] = {}
    for path in paths:
        volume = read(path)
        alignment = kept(path.name, template, lambda volume=volume: align(volume, template))
        print(f"{path.name}: overlap {alignment.overlap:.3f} {alignment.failed}", flush=True)
        if not alignment.failed:
            scans[path.name] = place(volume, alignment, template, find_brain(volume.pixels))
    return scans


def aligned_maps(paths: Sequence[Path], merging: Merging, template: Template) -> list[BrainMap]:
    """Classes on the template's grid, and where the map's field of view covers it."""
    maps: list[BrainMap] = []
    for path in paths:
        label_map = read_label_volume(path)
        classes = LabelMap(merging.to_classes(label_map.labels, str(path)), label_map.space)
        alignment = kept(f"labels-{path.name}", template, lambda classes=classes: align_labels(classes, template))
        print(f"{path.name}: overlap {alignment.overlap:.3f} {alignment.failed}", flush=True)
        if not alignment.failed:
            known = covered(label_map.space, template.space, alignment.transform)
            maps.append(BrainMap(resample(classes, template.space, alignment.transform).labels, known))
    return maps


def kept(name: str, template: Template, find: Callable[[], Alignment]) -> Alignment:
    """An alignment to a template, from an earlier run where there is one."""
    file = KEPT / f"{name}-{content_key(FIT, template.pixels, template.space)[:8]}.json"
    if not file.exists():
        find().write(file)
    return read_alignment(file)


if __name__ == "__main__":
    main()
