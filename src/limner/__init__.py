"""Limner turns incomplete annotations into complete segmentations of biomedical images.

Examples
--------
>>> import limner
>>> images = limner.read("sections/", spacing=(0.25, 0.01, 0.01))  # doctest: +SKIP
>>> labels = limner.read_labels("outlines/", images)  # doctest: +SKIP
>>> completion = limner.complete_stack(images, labels)  # doctest: +SKIP
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from limner.io import read as read
    from limner.io import read_labels as read_labels
    from limner.methods.stack_completion import complete as complete_stack

__all__ = ["__version__", "complete_stack", "read", "read_labels"]

# where each name lives: looked up when it is first used, for importing torch takes seconds
_LIVES_IN = {
    "read": ("limner.io", "read"),
    "read_labels": ("limner.io", "read_labels"),
    "complete_stack": ("limner.methods.stack_completion", "complete"),
}


def __getattr__(name: str) -> Any:
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("limner")
    if name not in _LIVES_IN:
        raise AttributeError(f"module 'limner' has no attribute {name!r}")
    module, attribute = _LIVES_IN[name]
    return getattr(importlib.import_module(module), attribute)


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
