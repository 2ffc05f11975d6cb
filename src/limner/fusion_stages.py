"""What is done once for a stack before labels are fused: faults found, sections registered, label flow; all kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from limner import stack_settings
from limner.parallel import jobs_on, side_by_side
from limner.registration.section_warps import SectionWarps, links, register_sections
from limner.registration.stack_alignment import Inspection, find_faults
from limner.registration.velocity_field import Options
from limner.run_record import Store, content_key, stored
from limner.section_fusion import SectionFusion
from limner.stack_settings import Settings

Progress = Callable[[str, int, int], None]


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
    if settings.registration == "direct":
        pairs = sorted({(max(z, a), min(z, a)) for z in range(n) for a in fusion.labelled_near(z)})
        anchors = {}
    orientations = dict(enumerate(faults.orientations.tolist())) if faults else {}
    setting = (settings.start, settings.stiffness, pairs, sorted(anchors.items()), sorted(orientations.items()))
    key = content_key(stack_settings.ALGORITHM, fusion.images, fusion.spacing, *setting)

    def registered() -> dict[str, NDArray[Any]]:
        options = Options(stiffness=settings.stiffness)
        return register_sections(
            fusion.images,
            pairs,
            fusion.spacing,
            start=settings.start,
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
