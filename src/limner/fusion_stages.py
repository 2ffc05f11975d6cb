"""What is done once for a stack: inputs checked, faults found, sections registered, label flow; what a fit stands on.

All but the first is kept in a store.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from limner import stack_settings
from limner.annotations import SectionLabels
from limner.completion import beyond_labels
from limner.fusion_scale import fitted_rho
from limner.mirror_image import ask_mirror_image
from limner.parallel import jobs_on, side_by_side
from limner.registration.section_warps import SectionWarps, links, register_sections
from limner.registration.stack_alignment import Inspection, consequence, find_faults
from limner.registration.velocity_field import Options
from limner.registration.warp import warp
from limner.run_record import Store, content_key, stored
from limner.section_fusion import FusionOptions, SectionFusion
from limner.stack_settings import Settings
from limner.volume import Volume

Progress = Callable[[str, int, int], None]
FITTED_LABELS = "fitted-labels"  # the stage; without it the next run fits anew
FITTED = ("rho", "network-1", "calibration", "network-2")
AS_TEXT = ("hashes", "stages", "keys")  # of what is kept of them
MAY_CHANGE = 0.25  # of the labelled sections that a fit stands on


def check(images: Volume, annotations: SectionLabels) -> None:
    """Raise ValueError where images and labels do not fit together or images hold no numbers."""
    labels = annotations.label_map
    if images.space.shape != labels.space.shape:
        raise ValueError(
            f"complete(): labels have shape {labels.space.shape}, images {images.space.shape} (z, y, x); give both on "
            "one grid"
        )
    if not np.allclose(images.space.spacing, labels.space.spacing, rtol=1e-3):
        raise ValueError(
            f"complete(): labels have spacing {labels.space.spacing} mm, images {images.space.spacing} mm (z, y, x); "
            "resample one"
        )
    lowest, highest = labels.labels.min(), labels.labels.max()
    if lowest < 0 or highest > np.iinfo(np.int32).max:
        raise ValueError(f"complete(): labels range from {lowest} to {highest}; renumber them from 0 to 2147483647")
    if not labels.labels[list(annotations.labelled)].any():
        raise ValueError("complete(): the labelled sections hold background only; label a structure on one of them")
    if not np.isfinite(images.pixels).all():
        raise ValueError("complete(): images hold NaN or infinity; replace them")


def new_fusion(images: Volume, annotations: SectionLabels, settings: Settings, device: str) -> SectionFusion:
    """The fusion of a stack that is not registered yet, as settings have it."""
    options = FusionOptions(**{n: getattr(settings, n) for n in FusionOptions.__dataclass_fields__})
    if settings.method == "network" or settings.registration == "direct":
        options = replace(options, label_flow=False)  # nothing is fused; it goes along the chain between labels
    return SectionFusion.of_stack(images, annotations, options, device)


def prepare(fusion: SectionFusion, settings: Settings, jobs: int, store: Store | None, report: Progress) -> None:
    """Set the inspection, the warps and the flows of `fusion`; what `store` has is read.

    Parameters
    ----------
    fusion : SectionFusion
        Of a stack that is not registered yet; changed in place.
    settings : Settings
        `registration`, `start`, `stiffness` and `clip_mm` are read.
    jobs : int
        Pairs whose label flow is sought at the same time; 0: one per processor core (one on a GPU).
    store : Store, optional
        Where the stages are kept.
    report : callable
        Called with the name of a stage, how much of it is done, and how much there is.
    """
    # torch's optimisers load this when the first of them is made, and parse Python then: see run_record.ONE_READS
    importlib.import_module("torch._dynamo")
    fusion.inspection = _inspected(fusion, settings, store, report)
    fusion.warps = _registered(fusion, settings, store, report)
    fusion.flows = _flows(fusion, settings, jobs, store, report)


def _inspected(fusion: SectionFusion, settings: Settings, store: Store | None, report: Progress) -> Inspection | None:
    """What is wrong with which sections; without registration they are taken as they are."""
    if settings.registration == "none":
        return None
    key = content_key(stack_settings.ALGORITHM, fusion.images, fusion.spacing)

    def found() -> dict[str, NDArray[Any]]:
        return find_faults(fusion.images, fusion.spacing, report).to_arrays()

    return Inspection.from_arrays(stored(store, "inspection", key, found))


def _registered(
    fusion: SectionFusion, settings: Settings, store: Store | None, report: Progress
) -> SectionWarps | None:
    if settings.registration == "none":
        return None
    n = len(fusion.images)
    faults = fusion.inspection
    pairs, anchors = links(n, faults.blank if faults else (), faults.torn if faults else ())
    options = Options.direct() if settings.registration == "direct" else Options()
    options = replace(options, start=settings.start, stiffness=settings.stiffness or options.stiffness)
    if settings.registration == "direct":
        pairs = sorted({(max(z, a), min(z, a)) for z in range(n) for a in fusion.labelled_near(z)})
        anchors = {}
    orientations = dict(enumerate(faults.orientations.tolist())) if faults else {}
    setting = (asdict(options), pairs, sorted(anchors.items()), sorted(orientations.items()))
    key = content_key(stack_settings.ALGORITHM, fusion.images, fusion.spacing, *setting)

    def registered() -> dict[str, NDArray[Any]]:
        return register_sections(
            fusion.images,
            pairs,
            fusion.spacing,
            options=options,
            device=fusion.device,
            progress=partial(report, "registration"),
            orientations=orientations,
            anchors=anchors,
        ).to_arrays()

    return SectionWarps.from_arrays(stored(store, "registration", key, registered))


def _flows(
    fusion: SectionFusion, settings: Settings, jobs: int, store: Store | None, report: Progress
) -> dict[tuple[int, int], Tensor]:
    """`SectionFusion.flow` of every pair that fitting and fusing will ask for."""

    def one(pair: tuple[int, int]) -> Tensor:
        before, after = pair
        if store is None:
            return fusion.flow(before, after)
        registered = fusion.displacement(before, after).cpu().numpy()
        key = content_key(
            stack_settings.ALGORITHM, fusion.spacing, settings.clip_mm, *(fusion.labels[a] for a in pair), registered
        )
        name = f"flow-{before:04}-{after:04}"
        arrays = stored(store, name, key, lambda: {"velocity": fusion.flow(before, after).cpu().numpy()})
        return torch.from_numpy(arrays["velocity"]).to(fusion.device)

    return side_by_side(fusion.flow_pairs(), one, jobs_on(fusion.device, jobs), partial(report, "label flow"))


def fit_borders(fusion: SectionFusion, settings: Settings, store: Store | None, key: str) -> dict[str, float]:
    """Set how sure fusion is of its borders, and with `Settings.mirror` whether the mirror image is asked.

    Parameters
    ----------
    fusion : SectionFusion
        Registered; its `rho_scale` and `beside` are set.
    settings : Settings
        `mirror` is read.
    store : Store, optional
        Where the scale is kept; with a mirror image it is fitted anew.
    key : str
        Of all that it depends on.

    Returns
    -------
    dict
        ``rho_scale``; with `Settings.mirror` also ``mirror``, as of `limner.mirror_image.ask_mirror_image`.
    """
    if settings.mirror:
        return ask_mirror_image(fusion)
    found = stored(store, "rho", key, lambda: {"rho_scale": np.asarray(fitted_rho(fusion)[0])})
    fusion.rho_scale = float(found["rho_scale"])
    return {"rho_scale": fusion.rho_scale}


def changes(fusion: SectionFusion) -> dict[tuple[int, int], float]:
    """How much anatomy changes, beyond what registration follows, between two labelled sections with others between.

    The share, in [0, 1], of what either of them holds that differs once the second is carried onto the first.
    """
    pairs = zip(fusion.labelled, fusion.labelled[1:], strict=False)
    return {(a, b): change(fusion, a, b) for a, b in pairs if b - a > 1}


def change(fusion: SectionFusion, before: int, after: int) -> float:
    """`changes` of two labelled sections."""
    moving = torch.from_numpy(fusion.labels[[after]].astype(np.float64))[None].to(fusion.device)  # exact to 2**53
    displacement = fusion.displacement(before, after).double()
    moved = warp(moving, displacement, fusion.spacing, mode="nearest", outside="zeros")[0, 0]
    fixed = torch.from_numpy(fusion.labels[before].astype(np.float64)).to(fusion.device)
    either = (moved > 0) | (fixed > 0)
    return float((moved != fixed)[either].double().mean()) if either.any() else 0.0


def labels_to_stand_on(
    fusion: SectionFusion, store: Store | None, key: str, held_out: list[int]
) -> tuple[str, list[int], list[int]]:
    """Which labels network and scales are to be fitted to: as they are, or as they were when they were fitted before.

    Who corrects a section waits for the sections that it speaks for, not for the network to be trained again. An
    earlier fit is kept while at most `MAY_CHANGE` of its labelled sections were changed, added or taken away, the
    same structures are labelled, one of the sections that were left out of it is still labelled, and the store has it
    whole; `limner.stack_scales.still_calibrated` is asked then. Else it is forgotten before another is begun, which
    takes the place of its stages one by one.

    Parameters
    ----------
    fusion : SectionFusion
        The stack with its labels as they are.
    store : Store, optional
        Where stages are kept; None: labels as they are.
    key : str
        Of all that fits depend on but labels.
    held_out : list of int
        Labelled sections that a fit to the labels as they are would leave out to fit scales on.

    Returns
    -------
    key : str
        Stands for the labels.
    changed : list of int
        Sections labelled otherwise since, increasing.
    held_out : list of int
        Those of the fit to stand on, where they are still labelled.
    """
    now, structures = _labels_now(fusion)
    earlier = store.load(FITTED_LABELS, key) if store is not None else None
    if earlier is not None and earlier["structures"].tolist() == structures:
        before = dict(zip(earlier["sections"].tolist(), earlier["hashes"].tolist(), strict=True))
        changed = sorted(z for z in {*now, *before} if now.get(z) != before.get(z))
        held = zip(earlier["stages"].tolist(), earlier["keys"].tolist(), strict=True)
        still = [z for z in earlier["held_out"].tolist() if fusion.labels[z].any() and z in now]
        few, whole = len(changed) <= MAY_CHANGE * len(before), store is not None and all(store.holds(*e) for e in held)
        none = not held_out and not len(earlier["held_out"])  # nor were there any
        if few and whole and (still or none):
            return content_key(sorted(before.items())), changed, still
    forget_fit(store)
    return content_key(sorted(now.items())), [], held_out


def remember_labels(
    fusion: SectionFusion, store: Store | None, key: str, fitted: Sequence[str], held_out: Sequence[int]
) -> None:
    """Keep for `labels_to_stand_on`, under its key, that everything is fitted to the labels as they are.

    Parameters
    ----------
    fusion, store, key, held_out
        As there.
    fitted : sequence of str
        Keys under which the stages of the fit are stored.
    """
    if store is not None:
        now, structures = _labels_now(fusion)
        stages = [(stage, k) for stage in FITTED for k in fitted if store.holds(stage, k)]
        kept = {"sections": [*now], "hashes": [*now.values()], "structures": structures}
        kept |= {"held_out": held_out, "stages": [stage for stage, _ in stages], "keys": [k for _, k in stages]}
        store.save(FITTED_LABELS, key, {n: np.asarray(v, str if n in AS_TEXT else int) for n, v in kept.items()})


def forget_fit(store: Store | None) -> None:
    """Let the next call of `labels_to_stand_on` find no earlier fit."""
    if store is not None:
        store.remove(FITTED_LABELS)


def notes_on_sections(fusion: SectionFusion, annotations: SectionLabels, settings: Settings) -> list[str]:
    """What the user should know of single sections: what is wrong with them, and where no label is near."""
    faults = fusion.inspection.faults() if fusion.inspection is not None else {}
    notes = []
    for z, what in faults.items():
        follows = consequence(what)
        if settings.method == "network":
            follows = "the network sees it as it is; look at its labels"
        if settings.method != "fusion" and z in annotations.labelled and z in fusion.misleading:
            follows = "the network is not taught by it" + ("" if settings.method == "network" else f"; {follows}")
        notes.append(f"Section {z} is {what}: {follows}.")
    for pair in fusion.warps.unmatched if fusion.warps is not None else ():
        notes.append(f"Sections {pair[1]} and {pair[0]} could not be registered: one is empty or constant.")
    empty = [z for z in annotations.labelled if not annotations.label_map.labels[z].any()]
    if empty:
        notes.append(f"Labelled, but with no structure, so that all of it is taken for background: {in_words(empty)}.")
    return [*notes, *beyond_labels(annotations)]


def kept_fit(changed: Sequence[int], redone: Sequence[int]) -> str:
    """What the user should know where labels were changed after network and scales had been fitted."""
    again = f"Done again: {in_words(redone)}." if redone else "No section had to be done again."
    return (
        f"Labels changed, added or taken away since the fit to the labels: {in_words(changed)}. The fit was kept "
        f"(--refit makes it anew). {again}"
    )


def in_words(sections: Sequence[int]) -> str:
    """Sections as text, those that follow one another together.

    Examples
    --------
    >>> in_words([3, 7, 8, 9, 10, 12, 13])
    'sections 3, 7 to 10, 12, 13'
    >>> in_words([5])
    'section 5'
    """
    runs: list[list[int]] = []
    for z in sorted(sections):
        if runs and z == runs[-1][-1] + 1:
            runs[-1].append(z)
        else:
            runs.append([z])
    texts = [f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs]
    return f"section{'s' if len(sections) > 1 else ''} {', '.join(texts)}"


def _labels_now(fusion: SectionFusion) -> tuple[dict[int, str], list[int]]:
    """What stands for the labels of each labelled section, and all structures on them."""
    hashes = {z: content_key(fusion.labels[z]) for z in fusion.labelled}
    return hashes, sorted({s for z in fusion.labelled for s in np.unique(fusion.labels[z]).tolist()})
