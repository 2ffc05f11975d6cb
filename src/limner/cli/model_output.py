"""What commands that train a model share: where it may be written, going on, and how much of its course is kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from limner.checkpoint import Checkpoint

ENDING = ".safetensors"
LOSSES_KEPT = 100


def check_model_path(output: Path, overwrite: bool, option: str = "--output") -> None:
    """Refuse a file that a model cannot or may not be written to.

    Parameters
    ----------
    output : Path
        Where the model is to go.
    overwrite : bool
        Whether the user allowed to replace what is there.
    option : str
        What named the file.

    Raises
    ------
    ValueError
        If it has another ending, is a folder, or exists and may not be replaced.
    """
    if output.suffix != ENDING:
        raise ValueError(f"{option}: {output} does not end in {ENDING}; name the model {output.stem}{ENDING}")
    if output.is_dir():
        raise ValueError(f"{option}: {output} is a folder; name a file")
    if output.exists() and not overwrite:
        raise ValueError(f"{option}: {output} exists; name another file or add --overwrite")


def announce(checkpoint: Checkpoint) -> int:
    """Steps that an earlier, stopped run has done; says so, or that what it did cannot be used."""
    steps = checkpoint.steps
    if steps:
        print(f"going on from step {steps} of a run that was stopped", flush=True)
    elif steps == 0:
        print("a run that was stopped had other settings or inputs: starting anew", flush=True)
    return steps or 0


def thinned(losses: Sequence[float]) -> list[float]:
    """Means of up to `LOSSES_KEPT` runs of steps of nearly equal length.

    Examples
    --------
    >>> thinned([1.0, 2.0]), len(thinned([0.5] * 250))
    ([1.0, 2.0], 100)
    """
    parts = np.array_split(np.asarray(losses), min(LOSSES_KEPT, len(losses)))
    return [float(part.mean()) for part in parts]
