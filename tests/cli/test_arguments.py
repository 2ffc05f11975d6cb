"""Lists of sections and spacings as they are typed."""

from __future__ import annotations

import pytest

from limner.cli.arguments import parse_indices, parse_spacing


@pytest.mark.parametrize(
    ("text", "indices"),
    [
        ("0,10,20", (0, 10, 20)),
        ("20,0,20", (0, 20)),
        (" 3 , 5-7", (3, 5, 6, 7)),
        ("0-250:100", (0, 100, 200)),
        ("0-200:100", (0, 100, 200)),
        ("4-4", (4,)),
    ],
)
def test_indices(text: str, indices: tuple[int, ...]) -> None:
    assert parse_indices(text) == indices


@pytest.mark.parametrize("text", ["", "a", "1,,2", "-1", "1.5", "0-9:0", "0:9", "1-"])
def test_malformed_indices_are_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no section index"):
        parse_indices(text)


def test_backward_range_is_refused() -> None:
    with pytest.raises(ValueError, match="runs backwards"):
        parse_indices("9-3")


def test_spacing() -> None:
    assert parse_spacing("0.05, 0.04,1e-3") == (0.05, 0.04, 0.001)


@pytest.mark.parametrize("text", ["", "1,1", "1,1,1,1", "1,x,1", "0,1,1", "1,-1,1", "1,1,nan", "inf,1,1"])
def test_malformed_spacing_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match="is no spacing"):
        parse_spacing(text)
