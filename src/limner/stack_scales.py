"""Scales that are fitted on labelled sections left out of fusion and network: lambda, temperature, width of intervals.

The network of the model for which they are fitted has not seen these sections.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from limner.calibration import first_within_one_standard_error, temperature_scaling
from limner.completion import area_errors, widest_errors
from limner.fusion_scale import sample
from limner.run_record import Store, stored
from limner.section_fusion import SectionFusion
from limner.stack_settings import Settings
from limner.tiled_evidence import TiledEvidence

WEIGHT_UNFITTED = 0.1  # lambda where no section can be left out to fit it
SAMPLED = 2**22  # pixels times structures of a section on which lambda is fitted, about
WEIGHTS_TRIED = (0.02, 0.05, 0.1, 0.15, 0.2, 0.3, 0.5, 0.8, 1.2, 2.0)  # lambda; the paper's is the last
MAY_BE_OFF = 1.5  # factor by which kept scales may differ from those that corrected labels ask for


class Model(Protocol):
    """What the scales are fitted for: `limner.methods.stack_completion.Model`, which says what each of these is."""

    settings: Settings
    fusion: SectionFusion
    weight_per_mm: float
    temperature: float
    area_width: float
    notes: list[str]

    def log_w(self, z: int, left_out: int | None = None) -> tuple[TiledEvidence, list[float], float]:
        """log w of a section, the objective's history, and mean entropy before GEM."""

    def network_evidence(self, z: int, left_out: int | None = None) -> TiledEvidence:
        """log p_d of a section."""

    def shown(self, z: int, left_out: int | None = None) -> tuple[int, ...]:
        """The neighbouring labelled sections that a network may be shown."""


def fit_scales(model: Model, held_out: Sequence[int], store: Store | None, key: str) -> dict[str, float]:
    """Fit lambda, the temperature and the width of intervals on the held-out sections, and set them.

    Parameters
    ----------
    model : Model
        Its `weight_per_mm`, `temperature` and `area_width` are set.
    held_out : sequence of int
        Labelled sections, left out one by one; none: lambda is `WEIGHT_UNFITTED` at the stack's typical spread, and a
        note says that nothing is calibrated.
    store : Store, optional
        Where the scales are kept.
    key : str
        Of all that they depend on.

    Returns
    -------
    dict
        ``weight_per_mm`` (1 / mm, where there are network and fusion), ``temperature``, ``area_width``, and the
        expected calibration error before and after, ``ece_before`` and ``ece_after``.
    """
    if not held_out:
        model.notes.append("Too few labelled sections to calibrate on; the uncertainty is not calibrated.")
        model.weight_per_mm = WEIGHT_UNFITTED / model.fusion.typical_spread() ** 2
        return {}

    def fitted() -> dict[str, NDArray[Any]]:
        scales = {}
        if model.settings.method in ("product", "gem") and not model.settings.weight_of_network:
            model.weight_per_mm = scales["weight_per_mm"] = fit_weight(model, held_out)
        left_out = {z: model.log_w(z, left_out=z)[0] for z in held_out}
        scales |= _temperature(model, left_out)
        model.temperature = scales["temperature"]
        scales["area_width"] = _area_width(model, left_out)
        return {name: np.asarray(value) for name, value in scales.items() if not math.isnan(value)}

    scales = {name: float(value) for name, value in stored(store, "calibration", key, fitted).items()}
    model.weight_per_mm = scales.get("weight_per_mm", math.nan)
    model.temperature, model.area_width = scales["temperature"], scales.get("area_width", math.nan)
    return scales


def still_calibrated(model: Model, held_out: Sequence[int]) -> bool:
    """Whether scales that were fitted to earlier labels do for those that there are now.

    They do not where the earlier labels of the held-out sections were none of the user's own, say: taken over from a
    result they agree with fusion, and what is fitted to that is far too sure.

    Parameters
    ----------
    model : Model
        With the scales set.
    held_out : sequence of int
        Labelled sections, left out one by one.

    Returns
    -------
    bool
        Whether temperature and width of intervals are within a factor of `MAY_BE_OFF` of those fitted now.
    """
    left_out = {z: model.log_w(z, left_out=z)[0] for z in held_out}
    if not left_out:
        return True
    pairs = [
        (model.temperature, _temperature(model, left_out)["temperature"]),
        (model.area_width, _area_width(model, left_out)),
    ]
    return all(abs(math.log(now / kept)) <= math.log(MAY_BE_OFF) for kept, now in pairs if kept > 0 and now > 0)


def fit_weight(model: Model, held_out: Sequence[int]) -> float:
    """lambda per mm of spread squared, by the pixels that come out right on sections left out of fusion and training.

    The smallest lambda that is within one standard error of the best: few sections decide, and too much weight costs
    more than too little. Accuracy, not log loss: the network's errors are alike along whole
    borders, so that log loss, which counts pixels as if they were independent, gives it several times too much weight.

    Parameters
    ----------
    model : Model
        With fusion and network.
    held_out : sequence of int
        Labelled sections; passed over where no neighbour may be shown to the network.

    Returns
    -------
    float
        1 / mm.
    """
    fusion, samples = model.fusion, []
    held_out = [z for z in held_out if model.shown(z, z)]
    if not held_out:
        return WEIGHT_UNFITTED / fusion.typical_spread() ** 2
    for z in held_out:
        structures = fusion.structures(z, z)
        pixels, truth = sample(fusion, z, structures, most=min(fusion.labels[z].size, SAMPLED // len(structures)))
        log_pd, variance = model.network_evidence(z, left_out=z).at(pixels), fusion.spread(z, z) ** 2
        samples.append((variance * log_pd, fusion.tiled_evidence(z, z).at(pixels), truth))

    def right(weight: float) -> list[float]:
        return [((weight * d + f).argmax(dim=0) == t).double().mean().item() for d, f, t in samples if len(t)]

    typical = sum(fusion.spread(z, z) ** 2 for z in held_out) / len(held_out)
    best = first_within_one_standard_error([right(power / typical) for power in WEIGHTS_TRIED])
    return WEIGHTS_TRIED[best] / typical


def _temperature(model: Model, left_out: Mapping[int, TiledEvidence]) -> dict[str, float]:
    """Temperature of the final log w on left-out sections, and the expected calibration error before and after."""
    samples = []
    for z, log_w in left_out.items():
        pixels, truth = sample(model.fusion, z, model.fusion.structures(z, z))
        samples.append((log_w.at(pixels), truth))
    return temperature_scaling(samples)


def _area_width(model: Model, left_out: Mapping[int, TiledEvidence]) -> float:
    """`limner.completion.widest_errors` of left-out sections' log w, once the temperature is set."""
    errors = []
    for z, log_w in left_out.items():
        structures = np.asarray(model.fusion.structures(z, z))
        sizes = log_w.tempered(model.temperature).areas()
        errors.append(area_errors(*sizes, structures, model.fusion.labels[z]))
    return widest_errors(errors, [model.fusion.spread(z, z) for z in left_out])
