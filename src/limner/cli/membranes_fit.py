"""``limner membranes fit``: check everything, train or go on training, fuse, score, write the model."""

from __future__ import annotations

import math
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Annotated, Any, Literal

from tyro.conf import FlagCreatePairsOff, Positional, arg

from limner.checkpoint import Checkpoint
from limner.cli.arguments import SectionAxis
from limner.cli.device import find_device
from limner.cli.model_output import announce, check_model_path, thinned
from limner.cli.progress import Report, progress_on
from limner.cli.traced_sections import Traced, choose_sections, read_traced
from limner.inference import Options
from limner.methods.membranes import (
    Fusion,
    Model,
    Network,
    Settings,
    TracedSection,
    build,
    choose_fusion,
    fused_map,
    known_noise,
    membrane_map,
    settle,
    to_model,
    train,
)
from limner.metrics.neurites import score_maps
from limner.run_record import content_key, package_versions, to_plain, utc_now

NONE = "(default: none)"
ALGORITHM = 1  # raised with every change that alters training: one that was stopped before it then starts anew
SCORES = {"v_rand": "V_rand", "v_info": "V_info"}


@dataclass(frozen=True)
class MembranesFit:
    """Train a model to find membranes on sections of electron micrographs in which they are traced.

    A few sections do. Those without labels are left out; each of the others is to be traced in full. A training that
    was stopped goes on where it stopped when the same command is given again.
    """

    images: Annotated[Positional[Path], arg(metavar="IMAGES")]
    """The sections: a folder of PNG, TIFF or JPEG, a multi-page TIFF, an OME-Zarr, or a NIfTI, NRRD, MHA or MGZ
    volume."""
    labels: Annotated[Positional[Path], arg(metavar="LABELS")]
    """Their membranes: a stack of the same shape, or a folder that holds labels of some sections under their images'
    names. Two values, membrane and cell; or an id for each cell, and those that touch are parted by a line."""
    output: Annotated[Path, arg(aliases=["-o"], metavar="MODEL", help_behavior_hint="(required)")]
    """The model to write, one file that ends in .safetensors."""
    validation: Annotated[str | None, arg(metavar="12-14,s20.png", help_behavior_hint=NONE)] = None
    """Traced sections to keep out of training, by number from 0 or by name: the model is scored on them."""
    membrane_is: int = 0
    """Value of membrane in LABELS; all other values are cells. ISBI 2012 has 0, others 255 or 1."""
    um_per_px: Annotated[float | None, arg(metavar="UM", help_behavior_hint="(default: from IMAGES)")] = None
    """Size of the images' pixels in micrometres, kept with the model; goes before what the files state."""
    section_axis: SectionAxis = "z"
    """Axis of a volume along which its sections run: z, y, x (or k, j, i in NIfTI's words); z is the slowest."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace MODEL where it exists."""
    settings: Settings = field(default_factory=Settings)

    def run(self, command_line: Sequence[str]) -> int:
        """Train, score and write the model.

        Raises
        ------
        ValueError
            If an input or an option is at fault; nothing is written then.
        """
        del command_line
        check_options(self)
        given = read_inputs(self)
        facts = describe(given, self)
        checkpoint = Checkpoint(self.output.with_name(f".{self.output.name}.partial"), given.key)
        try:
            with progress_on(sys.stderr) as report:
                self._train_and_write(given, facts, checkpoint, report)
        except KeyboardInterrupt:
            kept = f"; the same command goes on from step {checkpoint.steps}" if checkpoint.steps else ""
            print(f"\nStopped{kept}.", file=sys.stderr)
            return 130
        checkpoint.remove()
        print(f"Model: {self.output}")
        print(f"Next: limner membranes segment IMAGES {self.output} -o OUT --cells")
        return 0

    def _train_and_write(self, given: Inputs, facts: Mapping[str, Any], checkpoint: Checkpoint, report: Report) -> None:
        started, began = utc_now(), time.monotonic()
        done = announce(checkpoint)
        self.output.parent.mkdir(parents=True, exist_ok=True)
        network, device = build(given.settings), given.device.split()[0]

        def tell(step: int, steps: int) -> None:
            report("training", step - done, steps - done)

        with checkpoint.stop_after_step():
            losses = train(network, list(given.training.values()), given.settings, device, tell, checkpoint)
        trained = time.monotonic()
        fusion = fuse(given, network, report)
        model = Model(network, given.settings, fusion, given.um_per_px, known_noise(list(given.training.values())))
        scores = score(given, model) if given.validation else None
        seconds = {"training": round(trained - began, 1), "fusion": round(time.monotonic() - trained, 1)}
        course = {"started": started, "ended": utc_now(), "seconds": seconds, "resumed_at_step": done}
        origin = {"inputs": hashes_by_use(given), "versions": package_versions(), "device": given.device}
        record = {**facts, **origin, **course, "losses": thinned(losses), "validation": scores}
        to_model(model, to_plain(record)).write(self.output)
        print_result(losses, fusion, scores)


@dataclass(frozen=True)
class Inputs:
    """What the user gave, read and checked.

    Parameters
    ----------
    traced : Traced
        All traced sections.
    training, validation : mapping of str to TracedSection
        Those to train on, and those held out, by name.
    settings : Settings
        With the number of steps.
    um_per_px : float
        Pixel size, micrometres; NaN: not known.
    key : str
        Hash of all that the training depends on.
    device : str
        ``cpu``, or ``cuda`` with the GPU's name.
    """

    traced: Traced
    training: Mapping[str, TracedSection]
    validation: Mapping[str, TracedSection]
    settings: Settings
    um_per_px: float
    key: str
    device: str

    @property
    def options(self) -> Options:
        """Where maps are computed."""
        return Options(device="cuda" if self.device.startswith("cuda") else "cpu")


def check_options(command: MembranesFit) -> None:
    """Raise ValueError for an option that cannot be, before anything is read."""
    command.settings.check()
    check_model_path(command.output, command.overwrite)
    size = command.um_per_px
    if size is not None and not 0 < size < math.inf:
        raise ValueError(f"--um-per-px: {size} is no pixel size; give micrometres above 0")


def read_inputs(command: MembranesFit) -> Inputs:
    """Read and check every input.

    Raises
    ------
    ValueError
        The first fault found, in one line.
    """
    device = find_device(command.device)
    traced = read_traced(command.images, command.labels, command.membrane_is, command.section_axis)
    kept_out = choose_sections(command.validation, traced) if command.validation is not None else []
    validation = {name: traced.sections[name] for name in kept_out}
    training = {name: section for name, section in traced.sections.items() if name not in validation}
    if not training:
        raise ValueError(f"--validation: all {len(validation)} traced sections are kept out; leave some to train on")
    _warn_of_polarity(command, traced)
    settings = settle(list(training.values()), command.settings, device)
    key = content_key(ALGORITHM, asdict(settings), traced.hashes, command.membrane_is, command.section_axis, kept_out)
    um_per_px = traced.um_per_px if command.um_per_px is None else command.um_per_px
    return Inputs(traced, training, validation, settings, um_per_px, key, device)


def _warn_of_polarity(command: MembranesFit, traced: Traced) -> None:
    """Membranes are thin: labels that are membrane for the greater part are most likely taken the wrong way round."""
    share = membrane_share(list(traced.sections.values()))
    if share > 0.5:
        found = f"{share:.0%} of {command.labels} is membrane as --membrane-is {command.membrane_is} has it"
        others = [value for value in traced.values if value != command.membrane_is]
        mend = f"; is it {others[0]}?" if len(others) == 1 else "; is that option right?"
        warnings.warn(found + mend, stacklevel=2)


def membrane_share(sections: Sequence[TracedSection]) -> float:
    """Part of all pixels that is membrane, in [0, 1]."""
    return sum(int(s.membrane.sum()) for s in sections) / sum(s.membrane.size for s in sections)


def describe(given: Inputs, command: MembranesFit) -> dict[str, Any]:
    """Print what is trained on and with what; returns the facts for the record."""
    traced, settings = given.traced, given.settings
    share = membrane_share(list(given.training.values()))
    parameters = sum(p.numel() for p in build(settings).parameters())
    blank, kept_out = len(traced.of_one_value), len(given.validation)
    left_out = f"; {blank} whose labels hold one value alone left out" if blank else ""
    held = f", {kept_out} of them kept out of training" if kept_out else ""
    cells = f"; {len(traced.values)} values: cells that touch are parted" if len(traced.values) > 2 else ""
    size = "not stated" if math.isnan(given.um_per_px) else f"{given.um_per_px:g} um"
    print(f"sections: {len(traced.sections)} traced of {len(traced.stack)}{held}{left_out}")
    print(f"membrane: {share:.1%} of their pixels (--membrane-is {command.membrane_is}{cells}); pixel size {size}")
    steps = f"{settings.steps} steps of {settings.batch} patches of {settings.patch} x {settings.patch} pixels"
    print(f"network: {settings.network}, {parameters} parameters, {steps} on {given.device}", flush=True)
    return {
        "training_sections": list(given.training),
        "validation_sections": list(given.validation),
        "membrane_share": share,
        "membrane_is": command.membrane_is,
        "parameters": parameters,
    }


def hashes_by_use(given: Inputs) -> dict[str, dict[str, str]]:
    """SHA-256 of every file by argument and name, files of sections kept out of training by themselves."""
    kept_out = {
        Path(name).stem for name in given.validation if Path(name).suffix
    }  # not those of one file: "0", "1", ...
    hashes: dict[str, dict[str, str]] = {}
    for what, files in given.traced.hashes.items():
        hashes[what] = {name: sha for name, sha in files.items() if Path(name).stem not in kept_out}
        hashes[f"validation_{what}"] = {name: sha for name, sha in files.items() if Path(name).stem in kept_out}
    return hashes


def fuse(given: Inputs, network: Network, report: Report) -> Fusion:
    """The fusion, chosen on the sections trained on."""
    maps, sections = [], list(given.training.values())
    for done, section in enumerate(sections, start=1):
        maps.append(membrane_map(network, section.image, options=given.options))
        report("maps", done, len(sections))
    return choose_fusion(maps, sections, lambda done, n: report("fusion", done, n))


def score(given: Inputs, model: Model) -> dict[str, float]:
    """V_rand and V_info of the fused maps of the held out sections, at 0.5, and the best with their thresholds."""
    sections = given.validation.values()
    maps = [membrane_map(model.network, model.seen(s.image), options=given.options) for s in sections]
    fused = [fused_map(p, model.fusion) for p in maps]
    scored = score_maps(fused, [~section.membrane for section in sections])
    values: dict[str, float] = {}
    for name in SCORES:
        at, best = scored.best(name)
        half = getattr(scored.at_half.overall, name)
        values |= {name: half, f"{name}_best": getattr(best.overall, name), f"{name}_best_at": at}
    return values


def print_result(losses: Sequence[float], fusion: Fusion, scores: Mapping[str, float] | None) -> None:
    """Print the loss, the fusion, and the scores where there are any."""
    first, *_, last = thinned([losses[0], *losses])
    print(f"loss: {first:.4f} at first, {last:.4f} in the end")
    chosen = f"w_f {fusion.w_f:g}, basins less than {fusion.depth:g} deep joined" if fusion.w_f else "none (w_f 0)"
    print(f"watershed: {chosen}")
    if scores is None:
        print(f"V_rand {fusion.v_rand:.3f} on the sections trained on, which flatters; --validation keeps some out")
        return
    values = (
        f"{title} {scores[name]:.3f} at 0.5, best {scores[f'{name}_best']:.3f} at {scores[f'{name}_best_at']:g}"
        for name, title in SCORES.items()
    )
    print(f"validation: {'; '.join(values)}")
