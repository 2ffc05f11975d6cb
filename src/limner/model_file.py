"""One safetensors file for a trained model: weights, what they are for, settings and how they came about."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from limner.run_record import write_atomically

FORMAT = 1


@dataclass(frozen=True)
class ModelFile:
    """A trained model.

    Parameters
    ----------
    task : str
        What it is for, such as ``nuclei``.
    weights : mapping of str to Tensor
        As of `torch.nn.Module.state_dict`.
    settings : mapping
        Every setting it was made with, by name.
    pixel_size : float
        Micrometres a pixel at which it works.
    record : mapping
        How it was trained: versions, seeds, inputs, seconds, losses.

    Examples
    --------
    >>> import tempfile, torch
    >>> model = ModelFile("nuclei", {"w": torch.ones(2)}, {"steps": 5}, 0.25)
    >>> with tempfile.TemporaryDirectory() as folder:
    ...     model.write(Path(folder, "model.safetensors"))
    ...     read_model(Path(folder, "model.safetensors"), "nuclei").settings
    {'steps': 5}
    """

    task: str
    weights: Mapping[str, Tensor]
    settings: Mapping[str, Any]
    pixel_size: float
    record: Mapping[str, Any] = field(default_factory=dict)

    def write(self, path: Path) -> None:
        """Write the file, complete or not at all."""
        about = {
            "format": FORMAT,
            "task": self.task,
            "settings": dict(self.settings),
            "pixel_size": self.pixel_size,
            "record": dict(self.record),
        }
        content = save(
            {name: weight.detach().cpu().contiguous() for name, weight in self.weights.items()},
            metadata={"limner": json.dumps(about)},
        )
        write_atomically(path, lambda file: file.write(content))


def read_model(path: Path, task: str | None = None) -> ModelFile:
    """Read a model for `task`, or for whatever it is.

    Raises
    ------
    ValueError
        If the file is missing, damaged, not Limner's, newer than this Limner, or for another task.
    """
    fit = f"`limner {(task or 'nuclei').split()[-1]} fit`"
    if not path.is_file():
        raise ValueError(f"read_model(): {path} does not exist; name a model that {fit} wrote")
    try:
        with safe_open(str(path), framework="pt") as file:
            about = json.loads((file.metadata() or {}).get("limner", "null"))
            weights = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError, ValueError) as error:
        raise ValueError(
            f"read_model(): {path} cannot be read (truncated, or no model?): {error}; name one that {fit} wrote"
        ) from None
    if about is None:
        raise ValueError(f"read_model(): {path} is no model of Limner's; name one that {fit} wrote")
    if about["format"] > FORMAT:
        raise ValueError(f"read_model(): {path} comes from a newer Limner (format {about['format']}); update Limner")
    damaged = next((name for name, weight in weights.items() if not torch.isfinite(weight).all()), None)
    if damaged is not None:
        raise ValueError(f"read_model(): {path} is damaged ({damaged} holds no numbers); copy it again, or train anew")
    if task is not None and about["task"] != task:
        raise ValueError(f"read_model(): {path} is a model for {about['task']}; give one for {task}")
    return ModelFile(about["task"], weights, about["settings"], about["pixel_size"], about["record"])
