"""Scribbles: an organ in 3D from a few strokes on a few sections.

For whoever has a stack of sections and an organ whose border nobody wants to outline by hand: strokes for the organ and
for what is not the organ on some sections, a result for the whole stack, then more strokes where it errs.

Method of Harada et al. 2019 (multi-field-of-view U-Net, discriminative metric learning of Hu et al. 2014,
https://doi.org/10.1109/CVPR.2014.242, 3D graph cut of Boykov and Kolmogorov 2004,
https://doi.org/10.1109/TPAMI.2004.60).

| step | function |
| --- | --- |
| features: multi-field-of-view U-Net, trained on other volumes | `stroke_network.fit` |
| the same trained on this stack's strokes alone | `stroke_network.train_on_strokes` |
| metric learning on frozen features, then the 1 x 1 layer: heat maps | `stroke_network.learn`, `Session.heat_maps` |
| strokes spread through the volume | `Session.spread`, with `limner.random_walker` |
| gamma by leaving out strokes; s and delta are given | `choose_cut` |
| 3D graph cut | `Session.segment`, with `limner.graph_cut` |

Departures, with what they gained (docs/benchmarks.md):

- The heat maps are not cut as they are: they are the prior of a random walker, which carries the strokes to the nearest
  edges in three dimensions. Its chances are what is cut, and the uncertainty.
- A network that learns from strokes alone calls whatever lies far from them organ at random. Where no volumes to train
  on are given, none is therefore used: the strokes spread by themselves. With `prior_weight` above 0 one is trained, on
  the strokes and on the voxels of whose class the walker is sure.
- The 1 x 1 layer begins with 0 and is added to the network's own scores, where these are of the classes drawn: trained
  from nothing on strokes, it forgets part of what the network knows.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import nn

from limner.annotations import Scribbles
from limner.graph_cut import CutOptions, cut_labels
from limner.intensity import tissue_mask
from limner.networks.multi_field_unet import MultiFieldUNet
from limner.organ_maps import Organ, to_full_size
from limner.random_walker import WalkerOptions, random_walker
from limner.run_record import Store, content_key, stored
from limner.scribble_settings import Settings
from limner.stroke_network import (
    Learned,
    Model,
    Pixels,
    Progress,
    build,
    described,
    in_order,
    learn,
    own_scores,
    train_on_strokes,
)
from limner.volume import LabelMap, Sections, Volume
from limner.working_grid import Grid

ALGORITHM = 4  # raised with every change that alters results: what was kept before is then made anew
GAMMAS = (0.0, 0.3, 1.0, 3.0)
USUAL_GAMMA = 0.3  # the walker's chances are smooth already
AS_GOOD = 0.01  # share of left-out strokes: strokes lie inside organs, so that they hardly tell close gammas apart
LEAST_CONTRAST = 3.0  # grey levels: noise of less says nothing about edges
FEW_RIGHT = 0.75  # of left-out strokes: then the drawn sections lie too far apart
DOUBT = 0.1  # chance to be wrong from which a pixel speaks for drawing there: the little of empty ground does not
MOST_SURE = 20_000  # voxels that metric learning takes from the walker
MOST_LEFT_OUT = 6  # sections, to choose gamma


@dataclass(frozen=True)
class Segmentation:
    """What the strokes became.

    Parameters
    ----------
    labels : LabelMap
        0 background, 1, 2, ... the organs, as the strokes are numbered, in the smallest unsigned integer.
    heat_maps : sequence of MadeSections
        Chance of each class, background first: shape (Z, Y, X) each, in [0, 1]. A section is enlarged from the working
        grid when it is asked for; `numpy.asarray` gives a whole map.
    uncertainty : MadeSections
        Chance that the label is wrong, shape (Z, Y, X), in [0, 1]; likewise.
    organs : tuple of Organ
        One row an organ.
    suggestions : tuple of int
        Up to three sections to draw on next, the most uncertain first.
    cut : CutOptions
        What the graph cut used.
    walker : WalkerOptions
        What the random walker used.
    chosen : mapping of str to float
        Share of left-out strokes that came out right, by gamma; empty where gamma was given.
    seconds : mapping of str to float
        By stage.
    notes : tuple of str
        What the user should know.
    """

    labels: LabelMap
    heat_maps: Sequence[Sections]
    uncertainty: Sections
    organs: tuple[Organ, ...]
    suggestions: tuple[int, ...]
    cut: CutOptions
    walker: WalkerOptions = field(default_factory=WalkerOptions)
    chosen: Mapping[str, float] = field(default_factory=dict)
    seconds: Mapping[str, float] = field(default_factory=dict)
    notes: tuple[str, ...] = ()


@dataclass
class Session:
    """A stack with its frozen features: strokes come, are changed, come again.

    Parameters
    ----------
    images : Volume
        The stack.
    settings : Settings
        All settings.
    grid : Grid
        The stack as the method sees it.
    model : Model or None
        Trained on other volumes; None: strokes spread by themselves, or, with `prior_weight` above 0, a network learns
        from the first strokes.
    device : str
        ``cpu`` or ``cuda``.
    store : Store or None
        Where network and features are kept.
    progress : callable
        Called with a stage, what is done of it and what there is.

    Examples
    --------
    >>> session = Session.open(images, Settings())  # doctest: +SKIP
    >>> session.segment(scribbles).organs  # doctest: +SKIP
    >>> session.heat_map(more_scribbles, 40).shape  # doctest: +SKIP
    """

    images: Volume
    settings: Settings
    grid: Grid
    model: Model | None = None
    device: str = "cpu"
    store: Store | None = None
    progress: Progress = lambda *_: None
    seconds: dict[str, float] = field(default_factory=dict)
    _features: NDArray[np.float16] | None = None
    _chances: NDArray[np.float32] | None = None
    _walker: WalkerOptions = field(default_factory=WalkerOptions)
    _cut: dict[str, NDArray[Any]] | None = None
    _classes: tuple[int, ...] = ()

    @classmethod
    def open(
        cls,
        images: Volume,
        settings: Settings,
        model: Model | None = None,
        device: str = "cpu",
        store: Store | None = None,
        progress: Progress = lambda *_: None,
    ) -> Session:
        """Check settings and model against the stack; nothing is computed yet.

        Raises
        ------
        ValueError
            If a setting is out of range, or the model is for other channels or pixels.
        """
        settings.check()
        wanted = settings.working_um
        if model is not None and wanted is None:
            own = 1000 * math.sqrt(images.space.spacing[1] * images.space.spacing[2])
            wanted = max(model.um_per_px, own)
        grid = Grid.of(images, wanted)
        if model is not None:
            channels = model.network.fields[0].down[0][0].in_channels  # type: ignore[index, union-attr]
            kinds = {1: "grey", 3: "RGB"}
            if channels != grid.levels.shape[3]:
                raise ValueError(
                    f"segment(): the model is for {kinds[channels]} sections, the images are "
                    f"{kinds[grid.levels.shape[3]]}; train one on images like these"
                )
            if not 1 / 1.5 <= grid.um_per_px / model.um_per_px <= 1.5:
                raise ValueError(
                    f"segment(): the model works at {model.um_per_px:g} um a pixel, the images at {grid.um_per_px:g}; "
                    "resample the images"
                )
        return cls(images, settings, grid, model, device, store, progress)

    @property
    def prior_weight(self) -> float:
        """How far the walker follows the heat maps."""
        given = self.settings.prior_weight
        return given if given is not None else 0.0 if self.model is None else 0.3

    def heat_maps(self, scribbles: Scribbles, marks: NDArray[np.int32] | None = None) -> NDArray[np.float32]:
        """Heat maps of every section, (L, Z, Y, X) on the working grid: features, metric learning, 1 x 1 layer."""
        marks = self._marks(scribbles) if marks is None else marks
        features = self.features(scribbles)
        learned = self._learned(features, marks, scribbles)
        with self._timed("heat maps"):
            return np.stack([self._heat(learned, features, z) for z in range(len(marks))], axis=1)

    def heat_map(self, scribbles: Scribbles, z: int) -> NDArray[np.float32]:
        """Heat maps of one section, (L, Y, X) on the working grid, at once: what changes after each stroke.

        Where no network is used, the walker's chances, of the sections from the drawn one below to the one above.
        """
        marks = self._marks(scribbles)
        if self.prior_weight > 0:
            features = self.features(scribbles)
            return self._heat(self._learned(features, marks, scribbles), features, z)
        part = sections_around(marks, z)
        chances: NDArray[np.float32] = self.spread(marks, None, part)[:, z - part.start]
        return chances

    def features(self, scribbles: Scribbles) -> NDArray[np.float16]:
        """Frozen features (Z, C, Y, X): made once, of the network that the first strokes or the model gave."""
        marks = self._marks(scribbles)
        if self._features is not None:
            return self._features
        model = None if self.model is None else [str(self.model.um_per_px), *_weights(self.model.network)]
        classes = scribbles.classes if self.model is None else ()  # that the network tells apart
        key = content_key(ALGORITHM, self.settings.of_features(), classes, self.grid.levels, model)
        network = self.model.network if self.model is not None else self._network(marks, key)
        with self._timed("features"):
            sections = []
            for z in range(len(marks)):
                made = stored(self.store, f"features-{z:05}", key, partial(self._seen, network, z))
                sections.append(made["features"])
                self.progress("features", z + 1, len(marks))
        self._features = np.stack(sections)
        return self._features

    def spread(
        self,
        marks: NDArray[np.int32],
        heat: NDArray[np.float32] | None,
        sections: slice = slice(None),
        anew: bool = False,
    ) -> NDArray[np.float32]:
        """Chances (L, Z, Y, X) of a random walker from the strokes of some sections; the heat maps are its prior.

        It goes on from the chances of earlier strokes, unless `anew`.
        """
        self._walker = options = walker_options(self.grid, marks, self.settings, self.prior_weight)
        earlier = None if anew or self._chances is None or len(self._chances) != marks.max() else self._chances
        start = None if earlier is None else earlier[:, sections]
        prior = None if heat is None else heat[:, sections]
        return random_walker(self.grid.levels[sections], marks[sections], self.grid.spacing, options, prior, start)

    def segment(self, scribbles: Scribbles) -> Segmentation:
        """From strokes to organs; arguments and errors as of the function `segment`."""
        began = time.monotonic()
        self.seconds.clear()
        marks = self._marks(scribbles)
        _check_kept(scribbles, marks)
        heat = self.heat_maps(scribbles, marks) if self.prior_weight > 0 else None
        with self._timed("random walker"):
            self._chances = self.spread(marks, heat)
            walker = self._walker
        with self._timed("choice of gamma"):
            options, chosen = self._options(marks, heat)
        with self._timed("graph cut"):
            seeds = np.stack([marks == label + 1 for label in range(len(self._chances))])
            levels = np.rint(self.grid.levels).astype(np.uint8)
            levels = levels[..., 0] if levels.shape[-1] == 1 else levels
            labels = cut_labels(self._chances, levels, self.grid.spacing, options, seeds)
        maps = to_full_size(self.grid, self._chances, labels, scribbles, self.images.space)
        doubtful = [float(section[section > DOUBT].sum()) for section in maps.uncertainty]
        suggestions = suggest_sections(doubtful, scribbles.sections)
        self.seconds["all"] = time.monotonic() - began
        return Segmentation(
            LabelMap(maps.labels, self.images.space, scribbles.label_map.table, self.images.source),
            maps.heat_maps,
            maps.uncertainty,
            maps.organs,
            suggestions,
            options,
            walker,
            chosen,
            dict(self.seconds),
            self._notes(scribbles, chosen),
        )

    def _network(self, marks: NDArray[np.int32], key: str) -> MultiFieldUNet:
        """Trained on the strokes that came first; later ones do not change it, nor the features."""

        def make() -> dict[str, NDArray[Any]]:
            with self._timed("random walker"):
                chances = self.spread(marks, None)
            self._chances = chances
            with self._timed("network"):
                trained = train_on_strokes(self.grid, marks, chances, self.settings, self.device, self.progress)
            return {name: weight.cpu().numpy() for name, weight in trained.state_dict().items()}

        weights = stored(self.store, "network", key, make)
        n_classes = len(weights["head.bias"])
        network = build(self.settings, n_classes, self.grid.levels.shape[3] + 3)
        network.load_state_dict({name: torch.from_numpy(weight) for name, weight in weights.items()})
        return network.eval()

    def _seen(self, network: MultiFieldUNet, z: int) -> dict[str, NDArray[Any]]:
        section = self.grid.inputs([z], located=self.model is None).to(self.device)
        return {"features": described(network.to(self.device), section)[0].cpu().numpy().astype(np.float16)}

    def _marks(self, scribbles: Scribbles) -> NDArray[np.int32]:
        """Strokes on the working grid; what was found for other organs is forgotten."""
        if scribbles.classes != self._classes:
            self._classes, self._cut, self._chances = scribbles.classes, None, None
            self._features = None if self.model is None else self._features
        return self.grid.marks(scribbles)

    def _learned(self, features: NDArray[np.float16], marks: NDArray[np.int32], scribbles: Scribbles) -> Learned:
        n_classes, own = int(marks.max()), tuple[int, ...]()
        groups = [_pixels(features, np.nonzero(marks), marks[marks > 0] - 1)]
        if self.model is None:
            groups.append(self._sure(features, marks))
            own = tuple(range(-n_classes, 0))
        elif self.model.n_classes == n_classes:
            known = in_order(self.model, _names(scribbles))
            groups.append((known.features, known.labels))
            own = own_scores(self.model, _names(scribbles))
        with self._timed("metric learning"):
            return learn(groups, n_classes, self.settings, own)

    def _sure(self, features: NDArray[np.float16], marks: NDArray[np.int32]) -> Pixels:
        """Some voxels of whose class the walker is sure."""
        with self._timed("random walker"):
            chances = self.spread(marks, None)
        sure = np.flatnonzero(chances.max(axis=0) >= self.settings.sure)
        some = np.random.default_rng(self.settings.seed).choice(sure, min(len(sure), MOST_SURE), replace=False)
        classes = chances.reshape(len(chances), -1)[:, some].argmax(axis=0)
        return _pixels(features, np.unravel_index(some, marks.shape), classes)

    def _heat(self, learned: Learned, features: NDArray[np.float16], z: int) -> NDArray[np.float32]:
        heat: NDArray[np.float32] = learned(torch.from_numpy(features[z].astype(np.float32))[None])[0].numpy()
        return heat

    def _options(
        self, marks: NDArray[np.int32], heat: NDArray[np.float32] | None
    ) -> tuple[CutOptions, dict[str, float]]:
        given = self.settings
        base = CutOptions(
            0.0 if given.gamma is None else given.gamma,
            10.0 if given.contrast is None else given.contrast,
            0.1 if given.delta is None else given.delta,
        )
        if given.gamma is not None:
            return base, {}
        model = None if self.model is None else _weights(self.model.network)
        key = content_key(ALGORITHM, self._classes, asdict(self.settings), self.grid.levels, model)
        kept = self._cut or (self.store.load("gamma", key) if self.store is not None else None)
        if kept is None:  # the first strokes decide: a choice takes longer than a result
            options, right = choose_cut(self, marks, heat, base)
            if not right:
                return options, {}
            kept = {
                "gamma": np.array(options.gamma),
                "tried": np.array([*right]),
                "right": np.array([*right.values()]),
                "drawn": np.asarray(marks.any(axis=(1, 2))),
            }
            if self.store is not None:
                self.store.save("gamma", key, kept)
        self._cut = kept
        right = dict(zip(kept["tried"].tolist(), kept["right"].tolist(), strict=True))
        return replace(base, gamma=float(kept["gamma"])), right

    def _notes(self, scribbles: Scribbles, chosen: Mapping[str, float]) -> tuple[str, ...]:
        drawn = None if self._cut is None else tuple(np.flatnonzero(self._cut["drawn"]).tolist())
        return (*_notes_on_gamma(chosen, drawn, scribbles.sections), *_notes_on_model(self.model, scribbles))

    def _timed(self, stage: str) -> _Timer:
        return _Timer(self.seconds, stage)


@dataclass
class _Timer:
    seconds: dict[str, float]
    stage: str
    began: float = 0.0

    def __enter__(self) -> None:
        self.began = time.monotonic()

    def __exit__(self, *_: object) -> None:
        self.seconds[self.stage] = self.seconds.get(self.stage, 0.0) + time.monotonic() - self.began


def _notes_on_gamma(
    chosen: Mapping[str, float], before: tuple[int, ...] | None, sections: tuple[int, ...]
) -> Iterator[str]:
    if not chosen or before is None:
        return
    if before != sections:
        yield (
            f"gamma was chosen when {len(before)} sections were drawn on, now there are {len(sections)}; it is chosen "
            "anew in a new folder."
        )
    elif max(chosen.values()) < FEW_RIGHT:
        yield (
            f"Of strokes that were left out for a test {max(chosen.values()):.0%} came out right: the drawn sections "
            "lie far apart; draw on sections between them."
        )


def _notes_on_model(model: Model | None, scribbles: Scribbles) -> Iterator[str]:
    n_classes = len(scribbles.classes)
    if model is None:
        return
    if model.n_classes != n_classes:
        yield (
            f"The model knows {model.n_classes - 1} organs, the strokes {n_classes - 1}: only its features are used, "
            "not what it has learnt of its organs."
        )
    elif scribbles.classes != tuple(range(n_classes)) and in_order(model, _names(scribbles)).names != _names(scribbles):
        yield "The strokes leave out numbers of organs: they are taken for the model's organs in order."


def _names(scribbles: Scribbles) -> tuple[str, ...]:
    return tuple(scribbles.label_map.name_of(own) for own in scribbles.classes[1:])


def walker_options(grid: Grid, marks: NDArray[np.int32], settings: Settings, prior_weight: float) -> WalkerOptions:
    """What is given, else what suits the image's noise and how far apart the drawn sections are."""
    contrast, delta = settings.walker_contrast, settings.walker_delta
    if contrast is None:
        tissue = tissue_mask(grid.levels)
        change = np.linalg.norm(np.diff(grid.levels, axis=2), axis=-1)[tissue[:, :, 1:] & tissue[:, :, :-1]]
        contrast = max(LEAST_CONTRAST, 0.8 * float(np.median(change))) if change.size else LEAST_CONTRAST
    if delta is None:
        drawn = np.flatnonzero(marks.any(axis=(1, 2)))
        sections = float(np.median(np.diff(drawn))) if len(drawn) > 1 else len(marks) / 2
        gap = max(1.0, sections * grid.spacing[0] / math.sqrt(grid.spacing[1] * grid.spacing[2]))
        delta = min(0.05, max(1e-4, 0.4 / gap**2))
    return WalkerOptions(contrast, delta, prior_weight)


def sections_around(marks: NDArray[np.int32], z: int) -> slice:
    """From the drawn section below z, itself left out, to the one above; the stack where these lack a class."""
    drawn = np.flatnonzero(marks.any(axis=(1, 2)))
    part = slice(int(max(drawn[drawn < z], default=0)), int(min(drawn[drawn > z], default=len(marks) - 1)) + 1)
    return part if len(np.unique(marks[part])) > marks.max() else slice(0, len(marks))


def choose_cut(
    session: Session, marks: NDArray[np.int32], heat: NDArray[np.float32] | None, base: CutOptions
) -> tuple[CutOptions, dict[str, float]]:
    """The gamma at which most left-out strokes come out right; the usual one, where it is as good within .01.

    Each drawn section but the first and last loses its strokes in turn; the sections between the drawn ones around it,
    these included, are walked and cut without them.

    Returns
    -------
    options : CutOptions
        `base` with that gamma.
    right : dict of str to float
        Share of the left-out pixels that came out right, mean over classes and sections, by gamma.
    """
    drawn = np.flatnonzero(marks.any(axis=(1, 2))).tolist()
    inner = drawn[1:-1]
    inner = [inner[i] for i in np.linspace(0, len(inner) - 1, min(len(inner), MOST_LEFT_OUT)).round().astype(int)]
    right: dict[float, list[float]] = {gamma: [] for gamma in GAMMAS}
    for done, z in enumerate(inner):
        session.progress("choice of gamma", done, len(inner))
        below, above = max(d for d in drawn if d < z), min(d for d in drawn if d > z)
        part = slice(below, above + 1)
        without = marks.copy()
        without[z] = 0
        if len(np.unique(without[part])) <= marks.max():
            continue
        chances = session.spread(without, heat, part, anew=True)  # what is hidden must not shine through
        levels = np.rint(session.grid.levels[part]).astype(np.uint8)
        levels = levels[..., 0] if levels.shape[-1] == 1 else levels
        seeds = np.stack([without[part] == label + 1 for label in range(len(chances))])
        for gamma in GAMMAS:
            found = cut_labels(chances, levels, session.grid.spacing, replace(base, gamma=gamma), seeds)[z - below]
            truth = marks[z]
            right[gamma].append(
                float(np.mean([(found[truth == m] == m - 1).mean() for m in np.unique(truth[truth > 0])]))
            )
    scores = {gamma: float(np.mean(shares)) for gamma, shares in right.items() if shares}
    if not scores:
        return replace(base, gamma=USUAL_GAMMA), {}
    best = max(scores, key=lambda gamma: (scores[gamma], -gamma))
    chosen = USUAL_GAMMA if scores[USUAL_GAMMA] >= scores[best] - AS_GOOD else best
    return replace(base, gamma=chosen), {f"{gamma:g}": share for gamma, share in scores.items()}


def suggest_sections(total: Sequence[float], drawn: Sequence[int], most: int = 3) -> tuple[int, ...]:
    """Sections to draw on next, by the total uncertainty of each: apart from each other and from those drawn on."""
    apart = max(2, len(total) // 20)
    taken, chosen = list(drawn), list[int]()
    for z in np.argsort(-np.asarray(total), kind="stable").tolist():
        if total[z] > 0 and all(abs(z - other) >= apart for other in taken) and len(chosen) < most:
            chosen.append(z)
            taken.append(z)
    return tuple(chosen)


def segment(
    images: Volume,
    scribbles: Scribbles,
    settings: Settings,
    model: Model | None = None,
    device: str = "cpu",
    store: Store | None = None,
    progress: Progress = lambda *_: None,
) -> Segmentation:
    """Organs in 3D from strokes.

    Parameters
    ----------
    images : Volume
        The stack.
    scribbles : Scribbles
        Strokes for background and for one or more organs, on its grid.
    settings : Settings
        All settings.
    model : Model, optional
        Trained on other volumes with `fit`; None as of `Session`.
    device : str
        ``cpu`` or ``cuda``.
    store : Store, optional
        Where network and features are kept: with more strokes only what follows is done again.
    progress : callable
        Called with a stage, what is done of it and what there is.

    Returns
    -------
    Segmentation
        At the images' own size.

    Raises
    ------
    ValueError
        If a setting is out of range, strokes and images are of different shapes, or the model does not fit.
    """
    if scribbles.label_map.space.shape != images.space.shape:
        raise ValueError(
            f"segment(): strokes have shape {scribbles.label_map.space.shape}, images {images.space.shape} (z, y, x); "
            "draw on the images themselves"
        )
    return Session.open(images, settings, model, device, store, progress).segment(scribbles)


def _pixels(
    features: NDArray[np.float16], places: tuple[NDArray[np.intp], ...], classes: NDArray[np.integer[Any]]
) -> Pixels:
    """Features (Z, C, Y, X) and classes of some voxels."""
    z, y, x = places
    return torch.from_numpy(features[z, :, y, x].astype(np.float32)), torch.from_numpy(classes.astype(np.int64))


def _check_kept(scribbles: Scribbles, marks: NDArray[np.int32]) -> None:
    """A stroke one pixel wide may vanish under another's on a coarser grid."""
    kept = set(np.unique(marks[marks > 0]).tolist())
    lost = [own for index, own in enumerate(scribbles.classes) if index + 1 not in kept]
    if lost:
        raise ValueError(f"segment(): strokes of label {lost[0]} are lost at this --working-um; give a smaller one")


def _weights(network: nn.Module) -> list[NDArray[Any]]:
    return [weight.detach().cpu().numpy() for weight in network.state_dict().values()]
