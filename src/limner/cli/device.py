"""Where a command computes."""

from __future__ import annotations

from typing import Literal


def find_device(device: Literal["auto", "cpu", "cuda"]) -> str:
    """``cpu``, or ``cuda`` and the GPU's name.

    Raises
    ------
    ValueError
        If CUDA is asked for and absent.
    """
    import torch

    if device == "cpu" or (device == "auto" and not torch.cuda.is_available()):
        return "cpu"
    if not torch.cuda.is_available():
        raise ValueError("--device: cuda is asked for, but torch finds no CUDA GPU here; use --device cpu")
    return f"cuda ({torch.cuda.get_device_name()})"
