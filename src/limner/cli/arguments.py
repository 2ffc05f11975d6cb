"""Types of arguments that more than one command takes."""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import replace
from typing import Annotated, Literal

from tyro.constructors import (
    ConstructorRegistry,
    PrimitiveConstructorSpec,
    StructConstructorSpec,
    StructTypeInfo,
)

SectionAxis = Literal["z", "y", "x", "k", "j", "i"]


def parse_indices(text: str) -> tuple[int, ...]:
    """Section indices from a list of numbers and ranges.

    Parameters
    ----------
    text : str
        Indices from 0, separated by commas; ``A-B`` is every index from A to B, ``A-B:N`` every N-th of these from A.

    Returns
    -------
    tuple of int
        Increasing, each once.

    Raises
    ------
    ValueError
        If the text is of another form.

    Examples
    --------
    >>> parse_indices("0,10,20")
    (0, 10, 20)
    >>> parse_indices("0-250:100,7")
    (0, 7, 100, 200)
    """
    indices: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)(?:-(\d+)(?::(\d+))?)?\s*", part)
        if match is None or match[3] == "0":
            raise ValueError(f"{part!r} is no section index; give indices from 0, like 0,10,20 or 0-250:10")
        first = int(match[1])
        last = int(match[2]) if match[2] else first
        if last < first:
            raise ValueError(f"{part!r} runs backwards; give the lower index first")
        indices.update(range(first, last + 1, int(match[3] or 1)))
    return tuple(sorted(indices))


def parse_spacing(text: str) -> tuple[float, float, float]:
    """Spacing (z, y, x) in mm from three numbers separated by commas.

    Examples
    --------
    >>> parse_spacing("0.05,0.04,0.04")
    (0.05, 0.04, 0.04)
    """
    try:
        z, y, x = (float(part) for part in text.split(","))
    except ValueError:
        raise ValueError(f"{text!r} is no spacing; give three numbers in mm, like 0.05,0.04,0.04 (z, y, x)") from None
    if not (0 < z < float("inf") and 0 < y < float("inf") and 0 < x < float("inf")):
        raise ValueError(f"{text!r} is no spacing; every number must be above 0 mm")
    return z, y, x


def only_some(settings: type, names: Collection[str]) -> ConstructorRegistry:
    """Rules by which only those fields of a dataclass become options that are named; the others keep their defaults."""
    registry, busy = ConstructorRegistry(), set[type]()

    @registry.struct_rule
    def rule(info: StructTypeInfo) -> StructConstructorSpec | None:
        if info.type is not settings or settings in busy:
            return None  # by tyro's own rules, also where these are asked for below
        busy.add(settings)
        whole = ConstructorRegistry.get_struct_spec(info)
        busy.clear()
        assert isinstance(whole, StructConstructorSpec)
        return replace(whole, fields=tuple(field for field in whole.fields if field.name in names))

    return registry


Indices = Annotated[
    tuple[int, ...],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="0,10,20",
        instance_from_str=lambda texts: parse_indices(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda indices: [",".join(map(str, indices))],
    ),
]

Spacing = Annotated[
    tuple[float, float, float] | tuple[()],
    PrimitiveConstructorSpec(
        nargs=1,
        metavar="Z,Y,X",
        instance_from_str=lambda texts: parse_spacing(texts[0]),
        is_instance=lambda value: isinstance(value, tuple),
        str_from_instance=lambda spacing: [",".join(map(str, spacing))],
    ),
]
