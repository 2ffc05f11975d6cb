"""`limner stack suggest`: what it names, and what it needs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import SimpleITK as sitk

from limner.cli import main
from limner.run_record import RunRecord, write_record

SETTINGS: dict[str, Any] = {"positions": None, "spacing": [0.05, 0.02, 0.01]}
WRONG = [0, 0.1, 0.2, 0.1, 0, 0.3, 0.6, 0.3, 0]  # sections 0, 4 and 8 are labelled


def section(z: int, wrong: float) -> dict[str, Any]:
    return {"name": f"s{z}.png", "wrong_share": wrong, "in_doubt": ["Pons", "Medulla"] if z == 6 else ["Medulla"]}


@pytest.fixture
def out(tmp_path: Path) -> Path:
    folder = tmp_path / "out"
    folder.mkdir()
    sections = {str(z): section(z, wrong) for z, wrong in enumerate(WRONG) if wrong}
    record = RunRecord(("limner",), SETTINGS, {}, "cpu", 0, {"labelled": [0, 4, 8]})
    write_record(folder / "run.json", record.completed(sections=sections, suggestions=(6, 2)))
    return folder


def change(out: Path, **changed: Any) -> None:
    values = json.loads((out / "run.json").read_text())
    (out / "run.json").write_text(json.dumps(values | changed))


def rows(printed: str) -> list[list[str]]:
    return [line.rstrip().split(maxsplit=6) for line in printed.splitlines()[1:]]


def test_the_table_names_sections_and_reasons(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Labelling 6 rights .6 there; 5 and 7 come to half a section's distance of two labels, from 3/4 of it: 2/3."""
    before = (out / "run.json").read_bytes()
    assert main(["stack", "suggest", str(out), "-n", "2"]) == 0
    first, second = rows(capsys.readouterr().out)
    spared = 0.6 + 2 * 0.3 * (1 - 0.5 / 0.75)
    assert first == ["6", "s6.png", f"{spared:.2f}", "60%", "0.1", "mm", "Pons, Medulla"]
    assert second == ["2", "s2.png", f"{spared / 3:.2f}", "20%", "0.1", "mm", "Medulla"]
    assert [p.name for p in out.iterdir()] == ["run.json"]
    assert (out / "run.json").read_bytes() == before


def test_more_are_named_than_there_is_to_gain(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "suggest", str(out), "--number", "40"]) == 0
    printed = capsys.readouterr().out
    assert "No more than 6 would gain anything." in printed
    assert sorted(int(row[0]) for row in rows(printed)[:-1]) == [1, 2, 3, 5, 6, 7]


def test_three_are_named_unless_asked(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "suggest", str(out)]) == 0
    assert [row[0] for row in rows(capsys.readouterr().out)][:2] == ["6", "2"]
    change(out, settings={**SETTINGS, "positions": [0, 1, 2, 3, 4, 4.1, 4.2, 4.3, 4.4]})
    assert main(["stack", "suggest", str(out)]) == 0
    table = rows(capsys.readouterr().out)
    assert len(table) == 3
    assert table[0][4:6] == ["0.2", "mm"]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"status": "running"}, "is not finished; give its command again and let it finish"),
        ({"options": {}}, "was made by another command"),
        ({"sections": {"1": {"name": "s1.png"}}}, "earlier version of Limner; give its command again with --overwrite"),
        ({"sections": {str(z): section(z, 0.0) for z in (1, 2, 3)}}, "leaves nothing to suggest"),
        ({"sections": {}}, "leaves nothing to suggest"),
        ({"command": 3}, "is no record of a run"),
    ],
)
def test_what_is_no_finished_run(
    out: Path, changed: dict[str, Any], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    change(out, **changed)
    assert main(["stack", "suggest", str(out)]) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    assert printed.err.count("\n") == 1
    assert str(out) in printed.err
    assert message in printed.err


def test_no_run_and_no_number(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["stack", "suggest", str(out), "-n", "0"]) == 2
    assert "--number: 0 is below 1" in capsys.readouterr().err
    assert main(["stack", "suggest", str(out.parent)]) == 2
    assert "holds no run.json; name a folder that `limner stack complete` made" in capsys.readouterr().err
    assert main(["stack", "suggest", str(out / "run.json")]) == 2
    assert "holds no run.json" in capsys.readouterr().err


def test_it_names_what_complete_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The method itself, on a rod that tapers off between two labelled sections: that gap changes more."""
    z, y, x = np.indices((13, 30, 30))
    labels = (np.hypot(y - 15, x - 15) < 9 + 0.1 * z - 6 * (z > 7) * (z - 7) / 5).astype(np.uint8)
    images = (labels * 100 + np.random.default_rng(0).integers(0, 20, labels.shape)).astype(np.uint8)
    for name, array in {"images": images, "labels": labels}.items():
        volume = sitk.GetImageFromArray(array)
        volume.SetSpacing((0.02, 0.02, 0.05))
        sitk.WriteImage(volume, str(tmp_path / f"{name}.nii.gz"))
    arguments = [str(tmp_path / "images.nii.gz"), str(tmp_path / "labels.nii.gz"), "-o", str(tmp_path / "out")]
    options = ["--labelled", "0,6,12", "--method", "fusion", "--device", "cpu", "--jobs", "1"]
    assert main(["stack", "complete", *arguments, *options]) == 0
    printed = capsys.readouterr().out
    assert main(["stack", "suggest", str(tmp_path / "out")]) == 0
    chosen = [row[0] for row in rows(capsys.readouterr().out)]
    assert f"Label next: section {', '.join(chosen)} (the first is 0)." in printed
    assert len(chosen) == 3
    assert 6 < int(chosen[0]) < 12
