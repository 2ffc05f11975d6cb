"""What `gem` costs: Limner's schedule beside the paper's, which moves the whole network, and a whole run.

    python benchmarks/stack_speed.py              both schedules on a few sections of the mouse stack, one thread
    python benchmarks/stack_speed.py --left-out   global training with its first half on smaller sections, and without
    python benchmarks/stack_speed.py --whole      a whole run, two jobs: wants two idle cores

Coarse labels, every 10th section labelled from 0 to 250, withheld sections scored within 0.2 mm of their structures.

- Both schedules share registration, the network as trained globally, and the scales: lambda, rho and the temperature
  were fitted with the last layer alone moved, so that the paper's schedule is spared what fitting them would cost it.
  Seconds of a section in a whole run are those of the stages that all share over the sections scored (225), of local
  training over the sections of a gap (9), and the rest.
- `--left-out` scores on the labelled sections that are left out to fit the scales: nothing withheld is read.
- Seconds are those of the processor, but for `--whole`, which takes both.

Each call adds its part to benchmarks/results/stack_speed.json. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import time
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import asdict, replace
from functools import partial, wraps
from pathlib import Path
from typing import Any
from unittest.mock import patch

import numpy as np
import torch

from limner import fusion_stages
from limner.calibration import held_out_sections
from limner.fusion_scale import fitted_rho
from limner.methods import stack_completion
from limner.methods.stack_completion import Model, complete, fit
from limner.metrics.pixels import evaluation_mask
from limner.pixel_classifier import ClassifierOptions, PixelClassifier, make_classifier, train_globally
from limner.run_record import Store, content_key, machine, package_versions, stored, write_atomically
from limner.section_fusion import FusionOptions, SectionFusion
from limner.stack_scales import fit_weight
from limner.stack_settings import ALGORITHM, Settings
from stack_completion import Case, count, mouse_stack
from stack_methods import WITHIN_MM

EVERY = 10
HALVED = 0.5  # what --left-out compares with 0
SAME_LAMBDA = (0.08, 0.2, 0.48, 0.8)  # over squared spread, 1 / mm: --left-out compares products at each of these too
OF_A_STACK = {
    "faults": (fusion_stages, "_inspected"),
    "registration": (fusion_stages, "_registered"),
    "label flow": (fusion_stages, "_flows"),
    "rho": (fusion_stages, "fitted_rho"),
    "global training": (stack_completion, "train_globally"),
    "scales on left-out sections": (stack_completion, "fit_scales"),
}
OF_A_SECTION = {
    "local training": (stack_completion, "train_locally"),
    "features": (PixelClassifier, "fixed"),
    "fusion": (SectionFusion, "tiled_evidence"),
    "GEM": (stack_completion, "gem"),
}
OF_A_GAP = ("local training",)
Result = dict[str, Any]


class Clock:
    """Seconds by stage; those of a stage inside another count for the inner one alone.

    Parameters
    ----------
    now : callable
        The time, seconds.
    """

    def __init__(self, now: Callable[[], float] = time.process_time) -> None:
        self.now, self.seconds, self.inside = now, defaultdict[str, float](float), 0.0

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Count what is done inside for `name`."""
        began, before, self.inside = self.now(), self.inside, 0.0
        try:
            yield
        finally:
            spent = self.now() - began
            self.seconds[name] += spent - self.inside
            self.inside = before + spent

    @contextmanager
    def on(self, stages: dict[str, tuple[Any, str]], rest: str) -> Iterator[None]:
        """Count each call of the functions named, by their owner and name, for its stage; all else for `rest`."""
        with ExitStack() as patched:
            for name, (owner, attribute) in stages.items():
                patched.enter_context(patch.object(owner, attribute, self._counted(name, getattr(owner, attribute))))
            with self.stage(rest):
                yield

    def _counted(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        @wraps(function)
        def counted(*given: Any, **named: Any) -> Any:
            with self.stage(name):
                return function(*given, **named)

        return counted


def few_sections(case: Case, gaps: int, each: int) -> list[int]:
    """`each` sections of each of `gaps` gaps, evenly spread over the stack and over the gap."""
    labelled = case.annotations.labelled

    def spread(n: int, of: int) -> list[int]:
        return ((np.arange(n) + 0.5) * of / n).astype(int).tolist()

    steps = spread(each, case.every - 1)
    return [labelled[gap] + 1 + step for gap in spread(gaps, len(labelled) - 1) for step in steps]


def seconds_a_section(shared: dict[str, float], own: dict[str, float], case: Case, sections: Sequence[int]) -> float:
    """Of a whole run: `shared` over all sections scored, what is done once a gap over those of a gap, and the rest."""
    gaps = len({z // case.every for z in sections})
    once = sum(own.get(name, 0.0) for name in OF_A_GAP)
    rest = (sum(own.values()) - once) / len(sections)
    return sum(shared.values()) / len(case.sections("everywhere")) + once / gaps / (case.every - 1) + rest


def accuracy(case: Case, z: int, labels: np.ndarray) -> float:
    """Share of the pixels near structures that are right."""
    truth = case.truth
    mask = evaluation_mask(truth.labels[z], truth.space.spacing[1:], WITHIN_MM)
    counts = count(labels, truth.labels[z].astype(int), mask, int(truth.labels.max()) + 1)
    return counts.right / counts.n


def made_fusion(case: Case, settings: Settings, store: Store | None) -> SectionFusion:
    """The stack registered, with label flow."""
    options = FusionOptions(**{n: getattr(settings, n) for n in FusionOptions.__dataclass_fields__})
    fusion = SectionFusion.of_stack(case.images, case.annotations, options, "cpu")
    fusion_stages.prepare(fusion, settings, 1, store, lambda *_: None)
    return fusion


def schedule(model: Model, case: Case, sections: Sequence[int], shared: dict[str, float]) -> Result:
    """A schedule's seconds and accuracy on some sections; what is shared with other schedules is given."""
    clock, found, iterations = Clock(), [], []
    for z in sections:
        with clock.on(OF_A_SECTION, "E-steps at full size, calibrating"):
            result = model.complete_section(z, keep_probabilities=False)
        found.append(accuracy(case, z, result.labels))
        iterations.append(result.iterations)
        print(model.settings.trained_layers, z, round(found[-1], 4), result.iterations, flush=True)
    return {
        "seconds_by_stage": dict(clock.seconds),
        "seconds_a_section": sum(clock.seconds.values()) / len(sections),
        "seconds_a_section_of_a_whole_run": seconds_a_section(shared, clock.seconds, case, sections),
        "accuracy": dict(zip(map(str, sections), found, strict=True)),
        "mean_accuracy": float(np.mean(found)),
        "median_accuracy": float(np.median(found)),
        "iterations": iterations,
    }


def over_stops(seconds: dict[str, float], folder: Path | None) -> dict[str, float]:
    """Seconds by stage with those of the runs before that were stopped; kept in `folder`."""
    if folder is None:
        return seconds
    path = folder / "seconds.json"
    before = json.loads(path.read_text()) if path.exists() else {}
    total = {name: before.get(name, 0.0) + seconds.get(name, 0.0) for name in {**before, **seconds}}
    write_atomically(path, lambda handle: handle.write(json.dumps(total).encode()))
    return total


def both_schedules(case: Case, settings: Settings, gaps: int, each: int, folder: Path | None) -> Result:
    """Limner's schedule beside the paper's, on the same few sections, with one network trained globally."""
    store = None if folder is None else Store(folder)
    clock = Clock()
    with clock.on(OF_A_STACK, "reading, fitting"):
        fusion = made_fusion(case, settings, store)
        model, calibration, _ = fit(settings, fusion, store=store)
    assert model.classifier is not None
    shared = over_stops(clock.seconds, folder)
    print({name: round(seconds, 1) for name, seconds in shared.items()}, flush=True)
    options = replace(model.classifier.options, trained_layers="all")
    whole = replace(
        model,
        settings=replace(settings, trained_layers="all"),
        classifier=replace(model.classifier, options=options),
    )
    sections = few_sections(case, gaps, each)
    rows = {name: schedule(of, case, sections, shared) for name, of in (("last", model), ("all", whole))}
    return {
        "sections": sections,
        "gaps": gaps,
        "shared_seconds_by_stage": shared,
        "calibration": calibration,
        "rows": rows,
        "times_as_long": {
            name: rows["all"][name] / rows["last"][name]
            for name in ("seconds_a_section", "seconds_a_section_of_a_whole_run")
        },
        "threads": torch.get_num_threads(),
    }


def trained_without(
    fusion: SectionFusion, options: ClassifierOptions, held_out: Sequence[int], store: Store | None
) -> tuple[PixelClassifier, float]:
    """The network as it is when scales are fitted, and the seconds of its training."""
    classifier = make_classifier(fusion.images, fusion.labels, fusion.labelled, fusion.positions, options)
    known = [z for z in fusion.labelled if z not in held_out]

    def made() -> dict[str, np.ndarray]:
        clock = Clock()
        with clock.stage("training"):
            train_globally(classifier, known, (0.0, 0.7), None, lambda *_: None)
        return {**classifier.to_arrays(), "seconds": np.asarray(clock.seconds["training"])}

    name = f"left-out-halved-{options.halved:g}-seed-{options.seed}"
    arrays = stored(store, name, content_key(ALGORITHM, asdict(options), fusion.images, fusion.labels), made)
    seconds = float(arrays["seconds"])
    classifier.load({name: array for name, array in arrays.items() if name != "seconds"})
    return classifier, seconds


def left_out(case: Case, settings: Settings, seeds: Sequence[int], store: Store | None) -> Result:
    """Global training with and without its first half on smaller sections, on labelled sections left out of all."""
    fusion = made_fusion(case, settings, store)
    fusion.rho_scale, _ = fitted_rho(fusion)
    held_out, rows = held_out_sections(fusion.labelled), []
    for halved, seed in ((h, s) for s in seeds for h in (HALVED, 0.0)):
        chosen = replace(settings, halved=halved, seed=seed)
        options = ClassifierOptions(**{n: getattr(chosen, n) for n in ClassifierOptions.__dataclass_fields__})
        classifier, seconds = trained_without(fusion, options, held_out, store)
        model = Model(chosen, fusion, classifier)
        model.weight_per_mm = fit_weight(model, held_out)
        row: Result = {"halved": halved, "seed": seed, "training_seconds": seconds, "lambda": model.weight_per_mm}
        tried = [(method, model.weight_per_mm) for method in ("fusion", "network", "product", "gem")]
        tried += [("product", weight) for weight in SAME_LAMBDA]
        names = ["fusion", "network", "product", "gem", *(f"product, lambda {weight:g}" for weight in SAME_LAMBDA)]
        found: dict[str, dict[str, float]] = {name: {} for name in names}
        for z in held_out:
            structures = np.asarray(fusion.structures(z, z))
            for name, (method, weight) in zip(names, tried, strict=True):
                model.settings, model.weight_per_mm = replace(chosen, method=method), weight
                index = model.log_w(z, left_out=z)[0].best()[1].numpy()
                found[name][str(z)] = accuracy(case, z, structures[index])
        row |= {n: {"mean_accuracy": float(np.mean(list(of.values()))), "accuracy": of} for n, of in found.items()}
        rows.append(row)
        print({n: round(v["mean_accuracy"], 4) if isinstance(v, dict) else v for n, v in row.items()}, flush=True)
    return {"held_out": list(held_out), "rows": rows, "threads": torch.get_num_threads()}


def whole_run(case: Case, settings: Settings, jobs: int) -> Result:
    """Seconds of a whole run, and how right it is on all withheld sections."""
    began = time.perf_counter(), time.process_time()
    done = complete(case.images, case.annotations, settings, device="cpu", jobs=jobs)
    wall, cpu = time.perf_counter() - began[0], time.process_time() - began[1]
    sections = case.sections("everywhere")
    found = [accuracy(case, z, done.labels.labels[z].astype(int)) for z in sections]
    return {
        "jobs": jobs,
        "threads": torch.get_num_threads(),
        "scored": len(sections),
        "completed": len(done.sections),
        "wall_seconds": wall,
        "cpu_seconds": cpu,
        "wall_seconds_a_section": wall / len(sections),
        "cpu_seconds_a_section": cpu / len(sections),
        "wall_seconds_by_stage": dict(done.seconds),
        "mean_accuracy": float(np.mean(found)),
        "median_accuracy": float(np.median(found)),
        "minimum_accuracy": min(found),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/stack_speed.json"))
    parser.add_argument("--store", type=Path, help="keep stages and their seconds here, to go on after a stop")
    parser.add_argument("--steps", type=int, default=Settings().training_steps, help="of global training")
    parser.add_argument("--halved", type=float, default=Settings().halved, help="share of it on smaller sections")
    parser.add_argument("--gaps", type=int, default=3)
    parser.add_argument("--each", type=int, default=2, help="sections of a gap")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of --left-out")
    parser.add_argument("--jobs", type=int, default=2, help="of --whole")
    part = parser.add_mutually_exclusive_group()
    part.add_argument("--left-out", action="store_true")
    part.add_argument("--whole", action="store_true")
    given = parser.parse_args()
    stack = mouse_stack()
    if stack is None:
        return
    case, settings = Case(*stack, EVERY, displaced=False), Settings(training_steps=given.steps, halved=given.halved)
    if given.store is not None:
        given.store.mkdir(parents=True, exist_ok=True)
    store = Store(given.store) if given.store is not None else None
    if given.whole:
        name, make = "whole", partial(whole_run, case, settings, given.jobs)
    elif given.left_out:
        name, make = "left_out", partial(left_out, case, settings, given.seeds, store)
    else:
        name, make = "schedules", partial(both_schedules, case, settings, given.gaps, given.each, given.store)
    if not given.whole:
        torch.set_num_threads(1)
    about = {"every": EVERY, "settings": asdict(settings), "versions": package_versions(), "machine": machine()}
    result = json.loads(given.out.read_text()) if given.out.exists() else {}
    result[name] = {**make(), **about}
    given.out.parent.mkdir(parents=True, exist_ok=True)
    text = json.dumps(result, indent=1) + "\n"
    write_atomically(given.out, lambda handle: handle.write(text.encode()))
    print(json.dumps({k: v for k, v in result[name].items() if k not in about}, indent=1))


if __name__ == "__main__":
    main()
