"""Organs from scribbles, step by step: U-Net, several fields of view, metric learning, random walker, graph cut.

    python benchmarks/scribbles.py [--data stack models networks] [--out FILE]

`stack`: hippocampal formation and cerebellum of `stack_stpt_mouse` from strokes alone, as Limner does it, on 5
sections, three sets, and on 1 to 6 sections. `models`: five animals of `mouse_mri` with networks trained on the ten
others. `networks`: both with networks that are trained on the strokes alone, which Limner does not do unasked. A case's
rows are kept as soon as they are there; a stopped run goes on. Peers: benchmarks/scribble_peers.py. Reads LIMNER_DATA
(default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limner.annotations import Scribbles
from limner.graph_cut import CutOptions, cut_labels
from limner.methods.scribbles import Segmentation, Session
from limner.model_file import read_model
from limner.run_record import machine, package_versions
from limner.scribble_settings import Settings
from limner.stroke_network import LabelledVolume, Model, fit, from_model, to_model
from scribble_cases import Case, mouse_mri, mouse_stack, scores

TRAINED, TESTED = slice(0, 10), slice(10, 15)
DATA_SETS = ["stack", "models", "networks"]
GAMMAS = (0.3, 1.0, 3.0)
ON_STROKES = Settings(gamma=0.3, steps=200, rate=3e-3, sure=1.0, prior_weight=0.3)  # networks of strokes alone


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", choices=DATA_SETS, default=DATA_SETS)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scribbles.json"))
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for name in given.data:
        for key, case, strokes in problems(name):
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            models = {n: trained(case, n, given.out.parent) for n in (1, 3)} if name == "models" else {}
            first = key["seed"] == 0 and key["n_sections"] == 5
            rows += [{**key, **row} for row in ladder(name, case, strokes, models, first, key["seed"])]
            about = {"settings": vars(Settings()), "versions": package_versions(), "machine": machine()}
            given.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


def problems(name: str) -> Iterator[tuple[dict[str, Any], Case, Scribbles]]:
    """What tells a row from others, the case and its strokes."""
    stack = [] if name == "models" else mouse_stack()
    animals = [] if name == "stack" else mouse_mri(TESTED)
    more = [(0, 1), (0, 2), (0, 3), (0, 4), (0, 6)] if name == "stack" else []
    for seed, n in [(0, 5), (1, 5), (2, 5), *more]:
        for case in stack + (animals if seed == 0 else []):
            key = {"data": name, "volume": case.name, "organ": case.organ, "n_sections": n, "seed": seed}
            yield key, case, case.scribbles(case.sections(n), seed)


def trained(case: Case, fields: int, folder: Path) -> Model:
    """A model of the case's organ, trained on the other animals; kept in a file that is not part of the project."""
    file = folder / f"scribbles_mouse_mri_{case.organ}_{fields}.safetensors"
    if not file.exists():
        cases = [other for other in mouse_mri(TRAINED) if other.organ == case.organ]
        volumes = [LabelledVolume(other.images, other.truth.astype(np.uint8)) for other in cases]
        began = time.monotonic()
        model, losses = fit(volumes, Settings(fields=fields))
        to_model(model, {"seconds": time.monotonic() - began, "losses": losses[-20:]}).write(file)
    return from_model(read_model(file))


def ladder(
    data: str, case: Case, strokes: Scribbles, models: dict[int, Model], first: bool, seed: int
) -> Iterator[dict[str, Any]]:
    """A row for each step, every one on top of those before; gamma is chosen for the first set of strokes."""
    if data != "stack":
        given = Settings(gamma=0.3) if models else ON_STROKES
        one = Session.open(case.images, replace(given, fields=1), models.get(1))
        yield row(case, "U-Net", network_heat(one, strokes)[1] > 0.5, {})
        session = Session.open(case.images, given, models.get(3))
        found = network_heat(session, strokes)[1] > 0.5
        yield row(case, "+ several fields of view", found, {})
        yield from on_features(case, session, strokes, "", models)
        if models:
            where_wrong = case.scribbles(strokes.sections, seed, found)
            yield from on_features(case, session, where_wrong, "strokes where it errs: ", models)
    if data != "networks":
        alone = Session.open(case.images, Settings(gamma=0.0))
        yield row(case, "strokes alone, random walker", likely(alone.segment(strokes)), alone.seconds)
        gammas = (None, *GAMMAS) if first else (0.3,)
        yield from cuts(case, alone, strokes, gammas, "strokes alone, ")


def on_features(
    case: Case, session: Session, strokes: Scribbles, prefix: str, models: dict[int, Model]
) -> Iterator[dict[str, Any]]:
    """What follows the network: metric learning, graph cut; and the random walker between the two."""
    heat = session.heat_maps(strokes)
    yield row(case, f"{prefix}+ metric learning", heat[1] > 0.5, {})
    for gamma in GAMMAS[:2]:
        found = cut_of(heat, session, strokes, gamma)
        yield row(case, f"{prefix}+ metric learning, graph cut, gamma {gamma:g}", found, {})
    plain = replace(session, settings=replace(session.settings, metric_learning=False), seconds={})
    yield row(case, f"{prefix}1 x 1 layer without metric learning", plain.heat_maps(strokes)[1] > 0.5, {})
    anew = replace(session, settings=replace(session.settings, gamma=0.0), seconds={}, _chances=None, _cut=None)
    yield row(case, f"{prefix}random walker", likely(anew.segment(strokes)), anew.seconds)
    yield from cuts(case, anew, strokes, (None, *GAMMAS[:2]) if models else (1.0,), prefix)


def cuts(
    case: Case, session: Session, strokes: Scribbles, gammas: Sequence[float | None], prefix: str = ""
) -> Iterator[dict[str, Any]]:
    """The session's result, cut at each gamma; None: the one that it chooses."""
    for gamma in gammas:
        session.settings = replace(session.settings, gamma=gamma)
        result = session.segment(strokes)
        name = "graph cut" if gamma is None else f"graph cut, gamma {gamma:g}"
        more = {"gamma": result.cut.gamma, "chosen": dict(result.chosen)}
        yield row(case, f"{prefix}random walker, {name}", result.labels.labels > 0, session.seconds, **more)


def cut_of(heat: NDArray[np.float32], session: Session, strokes: Scribbles, gamma: float) -> NDArray[np.bool_]:
    """The organ by a graph cut of heat maps as they are, without a random walker."""
    marks = session.grid.marks(strokes)
    levels = np.rint(session.grid.levels[..., 0]).astype(np.uint8)
    seeds = np.stack([marks == 1, marks == 2])
    return cut_labels(heat, levels, session.grid.spacing, CutOptions(gamma), seeds) > 0


def likely(result: Segmentation) -> NDArray[np.bool_]:
    """Where the first organ's chance is above one half."""
    return np.asarray(result.heat_maps[1]) > 0.5


def network_heat(session: Session, strokes: Scribbles) -> NDArray[np.float32]:
    """The network's own heat maps: its logits are the last of the features."""
    features = session.features(strokes)
    return torch.softmax(torch.from_numpy(features[:, -2:].astype(np.float32)), dim=1).movedim(1, 0).numpy()


def row(case: Case, name: str, found: NDArray[np.bool_], seconds: dict[str, float], **more: Any) -> dict[str, Any]:
    """Scores of one step."""
    result = {
        "step": name,
        **scores(found, case.truth),
        "seconds": {k: round(v, 2) for k, v in seconds.items()},
        **more,
    }
    print(case.name, case.organ, name, f"IoU {result['iou']:.3f}", flush=True)
    return result


if __name__ == "__main__":
    main()
