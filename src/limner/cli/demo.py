"""``limner demo``: complete the sample stack and score the result against the labels withheld from it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

from tyro.conf import FlagCreatePairsOff, arg

SAMPLE = Path("examples", "data", "mouse_stack")
WITHIN_MM = 0.2
TRAINING_STEPS = 700  # fewer than the default, so that the demo takes minutes on two cores


@dataclass(frozen=True)
class Demo:
    """Complete the sample stack, 61 sections of a mouse brain of which 7 are labelled, and score the result.

    The scores are taken on the 54 sections whose labels are withheld. These labels are derived by registration, not
    drawn by hand: the scores compare methods and prove nothing about anatomy.
    """

    output: Annotated[Path, arg(aliases=["-o"], metavar="OUT")] = Path("demo-out")
    """Folder for the results."""
    data: Annotated[
        Path | None, arg(metavar="DIR", help_behavior_hint="(default: the sample in Limner's repository)")
    ] = None
    """Folder that holds a copy of the sample: images.nii.gz, labels.nii.gz, truth.nii.gz, structures.csv."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to compute; auto takes a GPU where there is one."""
    jobs: int = 0
    """Sections computed side by side on a CPU; 0: one for each core."""
    overwrite: FlagCreatePairsOff[bool] = False
    """Replace Limner's own files in OUT where they come from other settings or images, or were changed by hand."""

    def run(self, command_line: Sequence[str]) -> int:
        """Run `limner stack complete` on the sample."""
        sample = find_sample(self.data)
        from limner.cli.stack_complete import StackComplete
        from limner.stack_settings import Settings

        command = StackComplete(
            images=sample / "images.nii.gz",
            labels=sample / "labels.nii.gz",
            output=self.output,
            label_table=sample / "structures.csv",
            truth=sample / "truth.nii.gz",
            within_mm=WITHIN_MM,
            device=self.device,
            jobs=self.jobs,
            overwrite=self.overwrite,
            settings=Settings(training_steps=TRAINING_STEPS),
        )
        return command.run(command_line)


def find_sample(data: Path | None) -> Path:
    """Folder of the sample stack: `data`, else the repository's, upward from the working folder or this file.

    Raises
    ------
    ValueError
        If it is in neither, or a file of it is missing; says where to get it.
    """
    folder = data if data is not None else _in_repository()
    if folder is None:
        raise ValueError(
            f"limner demo: the sample is not part of the installed package; get the folder {SAMPLE.as_posix()} from "
            "Limner's repository and name it with --data"
        )
    for name in ("images.nii.gz", "labels.nii.gz", "truth.nii.gz", "structures.csv"):
        if not (folder / name).is_file():
            raise ValueError(
                f"limner demo: {folder} holds no {name}; name a complete copy of {SAMPLE.as_posix()} from Limner's "
                "repository with --data"
            )
    return folder


def _in_repository() -> Path | None:
    here, source = Path.cwd(), Path(__file__).resolve().parent
    for folder in (here, *here.parents, *source.parents):
        if (folder / SAMPLE).is_dir():
            return folder / SAMPLE
    return None
