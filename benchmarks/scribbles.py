"""Organs from scribbles, step by step: U-Net, several fields of view, metric learning, random walker, graph cut.

    python benchmarks/scribbles.py [--data stack mri models] [--out FILE]

`stack`: hippocampal formation and cerebellum of `stack_stpt_mouse`, strokes on 5 sections, three sets, from the strokes
alone; and IoU against 1 to 6 drawn sections. `mri`: five animals of `mouse_mri`, from the strokes alone. `models`: the
same with a network trained on the ten other animals. Each row is kept as soon as it is there; a stopped run goes on.
Peers: benchmarks/scribble_peers.py. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from limner.annotations import Scribbles
from limner.methods.scribbles import Segmentation, Session
from limner.model_file import read_model
from limner.run_record import machine, package_versions
from limner.scribble_settings import Settings
from limner.stroke_network import LabelledVolume, Model, fit, from_model, to_model
from scribble_cases import MOUSE_MRI, Case, mouse_mri, mouse_stack, scores

TRAINED, TESTED = slice(0, 10), slice(10, 15)
MODEL_STEPS, STROKES_STEPS = 2500, 200


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", nargs="+", default=["stack", "mri", "models"])
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scribbles.json"))
    given = parser.parse_args()
    rows = json.loads(given.out.read_text())["rows"] if given.out.exists() else []
    for name in given.data:
        for key, case, strokes, model in problems(name, given.out.parent):
            if any(all(row[k] == v for k, v in key.items()) for row in rows):
                continue
            rows += [{**key, **row} for row in ladder(name, case, strokes, model)]
            about = {"settings": vars(Settings()), "versions": package_versions(), "machine": machine()}
            given.out.write_text(json.dumps({"rows": rows, **about}, indent=1) + "\n")


Problem = tuple[dict[str, Any], Case, Scribbles, Model | None]


def problems(name: str, folder: Path) -> Iterator[Problem]:
    """What tells a row from others, the case, its strokes and the model."""
    if name == "stack":
        for seed, n in [(0, 5), (1, 5), (2, 5), (0, 1), (0, 2), (0, 3), (0, 4), (0, 6)]:
            for case in mouse_stack():
                key = {"data": name, "volume": case.name, "organ": case.organ, "n_sections": n, "seed": seed}
                yield key, case, case.scribbles(case.sections(n), seed), None
        return
    model = trained(folder / "scribbles_mouse_mri.safetensors") if name == "models" else {}
    for case in mouse_mri(TESTED):
        key = {"data": name, "volume": case.name, "organ": case.organ, "n_sections": 5, "seed": 0}
        yield key, case, case.scribbles(case.sections(5), 0), model.get(case.organ)


def trained(path: Path) -> dict[str, Model]:
    """One model an organ, trained on the other animals; kept in files that are not part of the project."""
    models = {}
    for organ, label in MOUSE_MRI.items():
        file = path.with_stem(f"{path.stem}_{organ}")
        if not file.exists():
            cases = [case for case in mouse_mri(TRAINED) if case.label == label]
            volumes = [LabelledVolume(case.images, case.truth.astype(np.uint8)) for case in cases]
            began = time.monotonic()
            model, losses = fit(volumes, Settings(steps=MODEL_STEPS))
            to_model(model, {"seconds": time.monotonic() - began, "losses": losses[-20:]}).write(file)
        models[organ] = from_model(read_model(file))
    return models


def ladder(data: str, case: Case, strokes: Scribbles, model: Model | None) -> Iterator[dict[str, Any]]:
    """A row for each step, every one on top of those before; networks not on the large stack, where they take hours."""
    given = Settings(gamma=0.0, steps=STROKES_STEPS)
    if data == "mri":
        alone = Settings(fields=1, sure=1.0, prior_weight=0.01, steps=STROKES_STEPS)
        yield row(case, "U-Net, strokes alone", network_heat(Session.open(case.images, alone), strokes)[1] > 0.5, {})
        given = replace(given, prior_weight=0.01)
        one = replace(given, fields=1)
        yield row(case, "U-Net", network_heat(Session.open(case.images, one), strokes)[1] > 0.5, {})
    session = Session.open(case.images, given, model)
    if data != "stack":
        yield row(case, "several fields of view", network_heat(session, strokes)[1] > 0.5, {})
        yield row(case, "+ 1 x 1 layer", session.heat_maps(strokes)[1] > 0.5, {})
        metric = replace(session, settings=replace(given, metric_learning=True))
        yield row(case, "+ metric learning", metric.heat_maps(strokes)[1] > 0.5, {})
        found = likely(metric.segment(strokes))
        yield row(case, "+ metric learning, random walker", found, {})
        yield row(case, "+ 1 x 1 layer, random walker", likely(session.segment(strokes)), session.seconds)
    by_itself = replace(session, settings=replace(given, prior_weight=0.0), seconds={}, _chances=None)
    yield row(case, "random walker of strokes", likely(by_itself.segment(strokes)), by_itself.seconds)
    last = by_itself if data != "models" else session
    for gamma in (None, 0.1, 0.3, 1.0, 3.0):
        last.settings = replace(last.settings, gamma=gamma)
        result = last.segment(strokes)
        name = "+ graph cut" if gamma is None else f"+ graph cut, gamma {gamma:g}"
        more = {"gamma": result.cut.gamma, "chosen": result.chosen}
        yield row(case, name, result.labels.labels > 0, last.seconds, **more)


def likely(result: Segmentation) -> NDArray[np.bool_]:
    """Where the first organ's chance is above one half."""
    return np.asarray(result.heat_maps[1]) > 0.5


def network_heat(session: Session, strokes: Scribbles) -> NDArray[np.float32]:
    """The network's own heat maps: its logits are the last of the features."""
    features = session.features(session.grid.marks(strokes))
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
