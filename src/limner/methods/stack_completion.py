"""Complete a sparsely labelled stack of sections: label every n-th section, get them all.

For the anatomist who outlined some sections of a stack and wants the rest, with a picture of where not to trust it.
The method is that of Atzeni et al. 2018 [1]_: label fusion from registered labelled sections and a network that knows
what structures look like are two factors of one model, fitted by generalised EM.

=================  ==========================================================================================
equation           function
=================  ==========================================================================================
Eq. 1, objective   `objective`
Eq. 2, E-step      `e_step`
Eq. 3, M-step      `m_step` (with ``log p_d`` in the second sum, where the paper prints ``log p_f``)
Eq. 4, fusion      `limner.section_fusion.SectionFusion.evidence`
=================  ==========================================================================================

Departures (what each gained, and the settings that take them back, stand in docs/benchmarks.md):

- Fusion blends signed distances along z, carried along registrations chained from section to section, over four
  labelled sections; their scale rho is fitted on left-out labelled sections. ``fusion='printed'`` is the paper's Eq. 4.
- What the chain leaves between two labelled sections is found from their labels and shared out on the way (label flow).
- The default network is a small U-Net on sections reduced to `network_pixels`, which also sees where a pixel lies.
  Local training, done once for all sections of a gap, and the M-step move its last layer only, on features computed
  once. Global training may begin on sections half as long and wide (`halved`).
- GEM's prior is centred on the weights that local training arrived at, so that the network keeps what it learnt from
  the other labelled sections; centred on zero, as in the paper, it gives in to fusion and the product is better.
- The network's probabilities are divided by the frequency of each structure, so that only fusion carries the prior, and
  lambda is fitted on left-out sections and falls with the distance to labels: the paper's 2 suits a network as good as
  the fusion.

References
----------
.. [1] Atzeni, Jansche, et al. 2018, "A probabilistic model combining deep learning and multi-atlas segmentation for
   semi-automated labelling of histology", https://doi.org/10.1007/978-3-030-00934-2_25
"""

from __future__ import annotations

import copy
import math
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache, partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional as F

from limner import stack_settings
from limner.annotations import SectionLabels
from limner.augmentation import Augmentation, augment
from limner.calibration import held_out_sections
from limner.completion import (
    NORMAL_WIDTH,
    Completion,
    Finished,
    SectionResult,
    assemble,
    pixels_between,
)
from limner.fusion_stages import (
    Progress,
    changes,
    check,
    fit_borders,
    forget_fit,
    kept_fit,
    labels_to_stand_on,
    new_fusion,
    notes_on_sections,
    prepare,
    remember_labels,
)
from limner.parallel import chosen_device, jobs_on, side_by_side
from limner.pixel_classifier import (
    ClassifierOptions,
    PixelClassifier,
    enlarged_window,
    make_classifier,
    network_log_probabilities,
    train_globally,
)
from limner.run_record import Store, content_key, stored, timed
from limner.section_fusion import SectionFusion
from limner.stack_scales import fit_scales, still_calibrated
from limner.stack_settings import Settings
from limner.tiled_evidence import Tile, TiledEvidence
from limner.volume import Volume

AUGMENTED_COPIES = 2  # of each neighbouring labelled section, in local training


# ---- one model: generalised EM ----------------------------------------------------------------------------------


@dataclass
class SectionData:
    """What GEM needs of one section, at the network's grid.

    Parameters
    ----------
    inputs : Tensor
        Of the section: features or the network's input, shape (1, C, y, x).
    atlas_inputs : Tensor
        The same of the N neighbouring labelled sections, as they are, shape (N, C, y, x).
    atlas_targets : Tensor
        Their labels as indices of structures, shape (N, y, x); -1 does not count.
    log_pf : Tensor
        log p_f, shape (L, y, x), up to a constant a pixel.
    log_frequency : Tensor
        log of how frequent each structure is on the labelled sections, shape (L, 1, 1), by which p_d of the section is
        divided, for p_f carries that already; 0: not divided.
    learnt : Tensor
        Weights that local training arrived at, all in one row, on which the prior of GEM is centred; 0: the paper's.
    """

    inputs: Tensor
    atlas_inputs: Tensor
    atlas_targets: Tensor
    log_pf: Tensor = field(default_factory=lambda: torch.zeros(0))
    log_frequency: Tensor = field(default_factory=lambda: torch.zeros(()))
    learnt: Tensor = field(default_factory=lambda: torch.zeros(()))


def e_step(log_pd: Tensor, log_pf: Tensor, weight: float) -> Tensor:
    """Eq. 2: log w, with w_l proportional to p_d^lambda p_f and normalised over structures.

    Parameters
    ----------
    log_pd, log_pf : Tensor
        Shape (L, Y, X), each up to a constant a pixel.
    weight : float
        lambda.

    Returns
    -------
    Tensor
        log w, shape (L, Y, X).

    Examples
    --------
    >>> network, fusion = torch.tensor([0.2, 0.8]), torch.tensor([0.8, 0.2])
    >>> w = e_step(network.log().view(2, 1, 1), fusion.log().view(2, 1, 1), weight=2.0).exp()
    >>> [round(float(v), 3) for v in w.flatten()]  # 0.04 * 0.8 to 0.64 * 0.2
    [0.2, 0.8]
    """
    return torch.log_softmax(weight * log_pd + log_pf, dim=0)


def weights_of(top: nn.Module) -> Tensor:
    """All weights in one row."""
    return nn.utils.parameters_to_vector(top.parameters())


def log_prior(top: nn.Module, data: SectionData, prior: float) -> Tensor:
    """log p(theta) up to a constant, nats: for each pixel of the section, minus `prior` |theta - learnt theta|^2."""
    return -prior * data.log_pf[0].numel() * (weights_of(top) - data.learnt).square().sum()


def atlas_log_likelihood(top: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    """Sum over atlases and pixels of log p_d(L_n), nats.

    Parameters
    ----------
    top : nn.Module
        Gives logits (N, L, y, x).
    inputs : Tensor
        Shape (N, C, y, x).
    targets : Tensor
        Indices of structures, shape (N, y, x); pixels with -1 do not count.
    """
    return -F.cross_entropy(top(inputs), targets, ignore_index=-1, reduction="sum")


def divided(log_pd: Tensor, data: SectionData) -> Tensor:
    """log p_d (L, y, x) divided by the structures' frequency and normalised again.

    Without the second normalisation GEM would gain without limit by calling everything the rarest structure.
    """
    return torch.log_softmax(log_pd - data.log_frequency, dim=0)


def section_log_pd(top: nn.Module, data: SectionData) -> Tensor:
    """log p_d of the section at the network's grid, `divided`, (L, y, x)."""
    return divided(network_log_probabilities(top, data.inputs)[0], data)


def objective(top: nn.Module, data: SectionData, weight: float, prior: float) -> float:
    """Eq. 1: log p(theta) + lambda sum log p_d(L_n) + sum log sum p_d^lambda p_f, nats.

    Parameters
    ----------
    top : nn.Module
        What theta is; in eval mode.
    data : SectionData
        The section and its neighbours, not augmented.
    weight : float
        lambda.
    prior : float
        As for `log_prior`.
    """
    with torch.no_grad():
        atlases = atlas_log_likelihood(top, data.atlas_inputs, data.atlas_targets)
        section = torch.logsumexp(weight * section_log_pd(top, data) + data.log_pf, dim=0).sum()
        return float(log_prior(top, data, prior) + weight * atlases + section)


def bound(top: nn.Module, data: SectionData, w: Tensor, weight: float, prior: float) -> Tensor:
    """Eq. 3: what the M-step ascends, sum log p_d(L_n) + sum w log p_d + log p(theta) / lambda.

    lambda times it, plus ``sum w log p_f`` and the entropy of `w`, is a lower bound of `objective` that touches it at
    the theta from which `e_step` made `w`. Parameters as for `objective`; `w` has shape (L, y, x) and sums to 1 over L.
    """
    atlases = atlas_log_likelihood(top, data.atlas_inputs, data.atlas_targets)
    section = (w * section_log_pd(top, data)).sum()
    return atlases + section + log_prior(top, data, prior) / weight


def m_step(top: nn.Module, data: SectionData, w: Tensor, weight: float, settings: Settings, rate: float) -> None:
    """Ascend Eq. 3 by a few Adam steps; `top` is changed in place."""
    optimiser = torch.optim.Adam(top.parameters(), lr=rate)
    for _ in range(settings.m_steps):
        optimiser.zero_grad()
        (-bound(top, data, w, weight, settings.gem_prior)).backward()
        optimiser.step()


def first_rate(top: nn.Module) -> float:
    """Adam's learning rate for a last layer, or for a whole network (FCN-8s is always moved whole)."""
    return 1e-2 if isinstance(top, nn.Conv2d) else 1e-4


def train_locally(top: nn.Module, inputs: Tensor, targets: Tensor, settings: Settings) -> None:
    """Stage 2: on the neighbouring labelled sections and augmented copies of them.

    Parameters
    ----------
    top : nn.Module
        Changed in place.
    inputs, targets : Tensor
        As for `atlas_log_likelihood`.
    settings : Settings
        `local_steps` and `prior` are read.
    """
    optimiser = torch.optim.Adam(top.parameters(), lr=first_rate(top))
    for _ in range(settings.local_steps):
        optimiser.zero_grad()
        likelihood = atlas_log_likelihood(top, inputs, targets) / targets.numel()
        (settings.prior * weights_of(top).square().sum() - likelihood).backward()
        optimiser.step()


def gem(top: nn.Module, data: SectionData, weight: float, settings: Settings) -> list[float]:
    """Alternate E and M. The objective never falls: an M-step that lowered it is undone and the rate quartered.

    Stops after `Settings.iterations`, when under 0.1 % of the pixels change class, or when the objective stalls.

    Parameters
    ----------
    top : nn.Module
        Changed in place.
    data : SectionData
        The section and its neighbours.
    weight : float
        lambda.
    settings : Settings
        `iterations`, `m_steps` and `gem_prior` are read.

    Returns
    -------
    list of float
        `objective` before GEM and after each iteration that was kept.
    """
    history = [objective(top, data, weight, settings.gem_prior)]
    rate = first_rate(top)
    log_w = e_step(section_log_pd(top, data).detach(), data.log_pf, weight)
    for _ in range(settings.iterations):
        before = copy.deepcopy(top.state_dict())
        m_step(top, data, log_w.exp(), weight, settings, rate)
        reached = objective(top, data, weight, settings.gem_prior)
        if reached < history[-1]:
            top.load_state_dict(before)
            rate /= 4
            if rate < 1e-5:
                break
            continue
        history.append(reached)
        new = e_step(section_log_pd(top, data).detach(), data.log_pf, weight)
        changed = (new.argmax(dim=0) != log_w.argmax(dim=0)).float().mean()
        log_w = new
        if changed < 1e-3 or reached - history[-2] < 1e-6 * abs(history[-2]):
            break
    return history


# ---- one section ------------------------------------------------------------------------------------------------


@dataclass
class Model:
    """Everything that is fitted once for the stack.

    Parameters
    ----------
    settings : Settings
        What was chosen.
    fusion : SectionFusion
        p_f.
    classifier : PixelClassifier, optional
        p_d; None for the method 'fusion'.
    weight_per_mm : float
        lambda over `SectionFusion.spread` squared: it grows with the variance of fusion's borders.
    temperature : float
        By which the final log w is divided for the user.
    area_width : float
        As `limner.completion.widest_errors` gives it; NaN: all pixels are taken to err alike.
    notes : list of str
        What the user should know.
    corrected, redone : list of int
        Labelled sections that were changed since the fit on which the model stands, and sections completed by this run.
    """

    settings: Settings
    fusion: SectionFusion
    classifier: PixelClassifier | None = None
    weight_per_mm: float = math.nan
    temperature: float = 1.0
    area_width: float = math.nan
    notes: list[str] = field(default_factory=list)
    corrected: list[int] = field(default_factory=list)
    redone: list[int] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.remember(gaps=2)

    def remember(self, gaps: int) -> None:
        """Keep local training of so many gaps (FCN-8s takes 0.5 GB each), trained once however many sections ask."""
        self.adapted = lru_cache(maxsize=gaps)(self._adapted)
        self.adapting = defaultdict[Any, threading.Lock](threading.Lock)

    def load(self, weights: Mapping[str, NDArray[Any]]) -> None:
        """Give the classifier other weights, and forget what was adapted from those before."""
        assert self.classifier is not None
        self.classifier.load(weights)
        self.adapted.cache_clear()

    def log_w(self, z: int, left_out: int | None = None) -> tuple[TiledEvidence, list[float], float]:
        """log w of a section at full size, the objective's history, and mean entropy before GEM."""
        method = self.settings.method
        by_fusion = method == "fusion" or z in self.fusion.misleading or not self.shown(z, left_out)
        if method == "network" or by_fusion:
            says = self.network_evidence if method == "network" else self.fusion.tiled_evidence
            evidence = says(z, left_out)
            return evidence, [], evidence.entropy()
        top, data = self.section_data(z, left_out)
        weight, log_pf = self.weight(z, left_out), self.fusion.tiled_evidence(z, left_out)
        before = self.product(top, data, log_pf, weight)
        if method == "product":
            return before, [], before.entropy()
        entropy_before = before.entropy()
        data.log_pf = log_pf.reduced((data.inputs.shape[2], data.inputs.shape[3])).clamp_min(1e-12).log()
        history = gem(top, data, weight, self.settings)
        return self.product(top, data, log_pf, weight), history, entropy_before

    def log_pd(self, top: nn.Module, data: SectionData) -> Callable[[Tile], Tensor]:
        """What gives `divided` log p_d of a tile of the section at full size: all of it is never in memory at once."""
        with torch.no_grad():
            logits = top(data.inputs)[0]

        def of_tile(tile: Tile) -> Tensor:
            large = enlarged_window(logits, self.fusion.shape, tile.rows, tile.columns)
            return divided(torch.log_softmax(large, dim=0), data)

        return of_tile

    def network_evidence(self, z: int, left_out: int | None = None) -> TiledEvidence:
        """`log_pd` of a section, with the network trained on its neighbours."""
        structures = len(self.fusion.structures(z, left_out))
        none = TiledEvidence.of_none(structures, self.fusion.shape, self.fusion.device)
        return none.combined(self.log_pd(*self.section_data(z, left_out)))

    def product(self, top: nn.Module, data: SectionData, log_pf: TiledEvidence, weight: float) -> TiledEvidence:
        """`e_step` at full size."""
        log_pd = self.log_pd(top, data)
        return log_pf.combined(lambda tile: e_step(log_pd(tile), tile.log_p, weight))

    def weight(self, z: int, left_out: int | None = None) -> float:
        """lambda of a section: as set, else in proportion to the variance of fusion's borders."""
        return self.settings.weight_of_network or self.weight_per_mm * self.fusion.spread(z, left_out) ** 2

    def shown(self, z: int, left_out: int | None = None) -> tuple[int, ...]:
        """The neighbouring labelled sections that a network may be shown."""
        return tuple(a for a in self.fusion.neighbours(z, left_out) if a not in self.fusion.misleading)

    def section_data(self, z: int, left_out: int | None = None) -> tuple[nn.Module, SectionData]:
        """A copy of the network as `adapted` to the neighbours of `z`; with what it sees of `z` and of them."""
        classifier, fusion = self.classifier, self.fusion
        assert classifier is not None
        gap = self.shown(z, left_out) or tuple(fusion.neighbours(z, left_out)), tuple(fusion.structures(z, left_out))
        with self.adapting[gap]:  # else the sections of a gap that are begun together would each train it
            top, inputs, targets = self.adapted(*gap)
        data = SectionData(classifier.fixed(classifier.images[[z]], [z]), inputs, targets)
        if self.settings.divide_by_frequency and self.settings.method != "network":
            data.log_frequency = fusion.log_frequency(z, left_out)
        if self.settings.gem_centre == "learnt":
            data.learnt = weights_of(top).detach()
        return copy.deepcopy(top), data

    def _adapted(self, atlases: Sequence[int], structures: Sequence[int]) -> tuple[nn.Module, Tensor, Tensor]:
        """Stage 2, the same for all sections of a gap: the network, and `SectionData`'s atlas_inputs and _targets."""
        classifier, settings = self.classifier, self.settings
        assert classifier is not None
        generator = torch.Generator().manual_seed(settings.seed + 7919 * (atlases[0] + 1))
        images = classifier.images[list(atlases)]
        targets = torch.stack([classifier.targets(a, structures) for a in atlases])
        inputs, labels = [classifier.fixed(images, atlases)], [targets]
        for _ in range(AUGMENTED_COPIES):
            moved, changed, weights = augment(images, targets, Augmentation().moved_by(settings.placement), generator)
            inputs.append(classifier.fixed(moved, atlases))
            labels.append(torch.where(weights > 0, changed, -1))
        top = classifier.top(structures, generator)
        train_locally(top, torch.cat(inputs), torch.cat(labels), settings)
        return top, inputs[0], targets

    def complete_section(self, z: int, keep_probabilities: bool) -> SectionResult:
        """All of one unlabelled section."""
        began = time.perf_counter()
        self.redone.append(z)
        log_w, history, entropy_before = self.log_w(z)
        tempered = log_w.tempered(self.temperature)
        width = NORMAL_WIDTH if math.isnan(self.area_width) else self.area_width * self.fusion.spread(z)
        confidence, best = tempered.best()
        structures = np.asarray(self.fusion.structures(z), dtype=np.int64)
        return SectionResult(
            labels=structures[best.cpu().numpy()].astype(np.int32),
            uncertainty=(1 - confidence).clamp(0, 1).cpu().numpy(),
            structures=structures,
            areas=pixels_between(*tempered.areas(), width, best.numel()),
            probabilities=tempered.dense().exp().half().cpu().numpy() if keep_probabilities else None,
            objective=history,
            entropy_before=entropy_before,
            entropy_after=log_w.entropy(),
            seconds=time.perf_counter() - began,
        )


# ---- fitting what is shared ---------------------------------------------------------------------------------------


def fit(
    settings: Settings,
    fusion: SectionFusion,
    tissues: Mapping[int, int] | None = None,
    store: Store | None = None,
    report: Progress = lambda *_: None,
) -> tuple[Model, dict[str, float], str]:
    """Fit rho, train the network (stage 1), fit lambda, the temperature and the width of intervals of areas.

    The network is trained without the held-out sections, the scales are fitted on these, then it is trained on all.

    Returns
    -------
    model : Model
    calibration : dict
        As in `Completion`.
    key : str
        What the results of the sections depend on.
    """
    model, calibration = Model(settings, fusion), dict[str, float]()
    options = ClassifierOptions(**{n: getattr(settings, n) for n in ClassifierOptions.__dataclass_fields__})
    misled = fusion.misleading
    stack = (stack_settings.ALGORITHM, fusion.images, fusion.positions, sorted(misled), tissues, fusion.device)
    unlabelled = content_key(*stack, options.identity(), fusion.spacing, asdict(settings))
    kept = None if settings.mirror else store  # what the mirror image says of a section follows from all labels
    held_out = [z for z in held_out_sections(fusion.labelled) if fusion.labels[z].any() and z not in misled]
    labels, changed, held_out = labels_to_stand_on(fusion, kept, unlabelled, held_out)
    key, everything = content_key(*stack, options.identity(), labels), content_key(unlabelled, labels)
    model.corrected = changed
    if settings.fusion == "blended" and not settings.rho and settings.method != "network":
        calibration |= fit_borders(fusion, settings, store, everything)
        if settings.mirror:
            found = ("not asked", "no better") if not calibration["mirror"] else ("asked", "better")
            model.notes.append(f"The mirror image was {found[0]}: left-out sections come out {found[1]} with it.")
    if settings.method == "fusion":
        calibration |= fit_scales(model, held_out, store, everything)
        if not changed:
            remember_labels(fusion, kept, unlabelled, (key, everything), held_out)
        elif not still_calibrated(model, held_out):
            forget_fit(store)
            return fit(settings, fusion, tissues, store, report)
        # a section then depends on its own atlases and, through the scales, a little on the left-out sections
        return model, calibration, content_key(stack_settings.ALGORITHM, fusion.spacing, asdict(settings), calibration)
    model.classifier = make_classifier(
        fusion.images, fusion.labels, fusion.labelled, fusion.positions, options, tissues, fusion.device
    )
    for name, left_out, part in (("network-1", held_out, (0.0, 0.7)), ("network-2", (), (0.7, 1.0))):
        known = [z for z in fusion.labelled if z not in left_out and z not in misled] or list(fusion.labelled)
        steps = partial(report, "training")
        make = partial(train_globally, model.classifier, known, part, tissues, steps)
        model.load(stored(store, name, key, make))
        if name == "network-1":
            calibration |= fit_scales(model, held_out, store, everything)
            if changed and not still_calibrated(model, held_out):
                forget_fit(store)
                return fit(settings, fusion, tissues, store, report)
    if not changed:
        remember_labels(fusion, kept, unlabelled, (key, everything), held_out)
    return model, calibration, content_key(everything, calibration)


# ---- the whole stack ----------------------------------------------------------------------------------------------


def complete(
    images: Volume,
    annotations: SectionLabels,
    settings: Settings | None = None,
    *,
    device: str = "auto",
    jobs: int = 0,
    store: Store | None = None,
    progress: Progress | None = None,
    tissues: Mapping[int, int] | None = None,
    keep_probabilities: bool = False,
    finished: Finished = lambda _, result: result,
) -> Completion:
    """Label every section of a stack of which some are labelled.

    Parameters
    ----------
    images : Volume
        The sections, roughly aligned or not, grey or RGB.
    annotations : SectionLabels
        Labels of some sections, on the same grid.
    settings : Settings, optional
        Default: ``Settings()``.
    device : {'auto', 'cpu', 'cuda'}
        Where to compute; 'auto' takes a GPU if there is one.
    jobs : int
        Sections completed at the same time; 0: one per processor core (one on a GPU).
    store : Store, optional
        Where finished stages are kept; a second call with the same inputs goes on from there.
    progress : callable, optional
        Called with the name of a stage, how much of it is done, and how much there is.
    tissues : mapping of int to int, optional
        Tissue type of each structure, for the first stage of training.
    keep_probabilities : bool
        Keep class probabilities of every section.
    finished : callable, optional
        Called with the index and the result of every section once it is done, from any thread; what it returns is kept
        in its place. Where `store` is given this holds the whole result all the same.

    Returns
    -------
    Completion

    Raises
    ------
    ValueError
        If images and labels lie on different grids, every labelled section is empty, images hold NaN or infinity, or
        there is no such device.

    Examples
    --------
    >>> from limner.space import Space
    >>> from limner.volume import LabelMap
    >>> space = Space(shape=(3, 8, 8), spacing=(0.1, 0.1, 0.1))
    >>> labels = np.zeros(space.shape, dtype=np.uint8)
    >>> labels[0, :2], labels[2, :6] = 1, 1  # a structure that grows from two rows to six
    >>> annotations = SectionLabels(LabelMap(labels, space), labelled=(0, 2))
    >>> settings = Settings(method="fusion", registration="none")
    >>> completion = complete(Volume(np.zeros(space.shape), space), annotations, settings, device="cpu")
    >>> completion.labels.labels[1, :, 0]
    array([1, 1, 1, 1, 0, 0, 0, 0], dtype=uint8)
    """
    settings, report = settings or Settings(), progress or (lambda *_: None)
    settings.check()
    check(images, annotations)
    device = chosen_device(device)
    fusion = new_fusion(images, annotations, settings, device)
    if not annotations.unlabelled:
        return assemble(annotations, {}, {}, {}, (), {})
    seconds: dict[str, float] = {}
    with timed(seconds, "registration"):
        prepare(fusion, settings, jobs, store, report)
    with timed(seconds, "fit"):
        model, calibration, key = fit(settings, fusion, tissues, store, report)
    with timed(seconds, "sections"):
        asked = (key, keep_probabilities)
        sections = _completed(model, annotations.unlabelled, asked, jobs, store, report, finished)
    if model.corrected:
        model.notes.append(kept_fit(model.corrected, model.redone))
    notes = (*model.notes, *notes_on_sections(fusion, annotations, settings))
    return assemble(annotations, sections, seconds, calibration, notes, changes(fusion))


def _completed(
    model: Model,
    unlabelled: Sequence[int],
    asked: tuple[str, bool],
    jobs: int,
    store: Store | None,
    report: Progress,
    finished: Finished,
) -> dict[int, SectionResult]:
    """Complete sections, `jobs` at a time; each is stored as soon as it is done."""
    fusion, (_, kept), jobs = model.fusion, asked, jobs_on(model.fusion.device, jobs)
    gaps = [tuple(fusion.neighbours(z)) for z in unlabelled]  # sections are taken in order: so many may be open at once
    model.remember(max(len({*gaps[i : i + jobs + 1]}) for i in range(len(gaps))))

    def one(z: int) -> SectionResult:
        key = content_key(*asked, z, *fusion.inputs(z)) if store is not None else ""
        arrays = stored(store, f"section-{z:04}", key, lambda: model.complete_section(z, kept).to_arrays())
        return finished(z, SectionResult.from_arrays(arrays))

    return side_by_side(unlabelled, one, jobs, partial(report, "sections"))
