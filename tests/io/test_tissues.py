"""The table of structures and tissues."""

from __future__ import annotations

from pathlib import Path

import pytest

from limner.io.tissues import read_shared_tissues, read_tissues
from limner.volume import Label

TABLE = {3: Label("Pons", (1, 2, 3)), 200: Label("Medulla, left", (4, 5, 6)), 9: Label("Fornix", (7, 8, 9))}


def write(folder: Path, text: str) -> Path:
    path = folder / "tissues.csv"
    path.write_text(text, encoding="utf-8")
    return path


def test_structures_by_name_or_index_in_any_order(tmp_path: Path) -> None:
    path = write(tmp_path, '\ufeffcolour,Tissue,structure\nred,grey,Pons\n,grey,"Medulla, left"\n,white,9\n,none,0\n')
    assert read_tissues(path, TABLE, [3, 200, 9]) == {0: 0, 3: 1, 200: 1, 9: 2}


def test_rows_for_structures_that_do_not_occur_are_kept(tmp_path: Path) -> None:
    path = write(tmp_path, "structure,tissue\n9,2\n3,1\n")
    assert read_tissues(path, TABLE, [0, 3]) == {0: 0, 9: 1, 3: 2}


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("", "has no columns structure and tissue"),
        ("structure;tissue\n3;1\n", "has no columns structure and tissue"),
        ("structure,tissue\n3\n", "line 2 of .* has an empty field"),
        ("structure,tissue\n3,grey\n,white\n", "line 3 of .* has an empty field"),
        ("structure,tissue\nPonz,grey\n", "line 2 of .* names the structure 'Ponz', which the label table lacks"),
        ("structure,tissue\n3,grey\nPons,white\n", "line 3 of .* names the structure 'Pons' a second time"),
        ("structure,tissue\n3,grey\n", r"has no row for structure 9 \(Fornix\)"),
    ],
)
def test_faults_are_named(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ValueError, match=rf"read_tissues\(\): .*{found}"):
        read_tissues(write(tmp_path, text), TABLE, [3, 9])


def test_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"nothing\.csv cannot be read"):
        read_tissues(tmp_path / "nothing.csv", TABLE, [3])


STRUCTURES = [("background", (0, 500)), ("Cortex", (3, 42)), ("ventricle", (4, 43)), ("fluid", (24,))]


def test_structures_that_share_a_tissue_and_others_that_do_not(tmp_path: Path) -> None:
    path = write(tmp_path, "structure,tissue\n24,wet\ncortex,grey\n43,Wet\n0,wet\n")
    assert read_shared_tissues(path, STRUCTURES) == [0, 1, 0, 0]
    path = write(tmp_path, "structure,tissue\nbackground,wet\n24,wet\n")
    assert read_shared_tissues(path, STRUCTURES) == [0, 1, 2, 0]


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("structure;tissue\n3;1\n", "has no columns structure and tissue"),
        (
            "structure,tissue\nputamen,a\n",
            "line 2 of .* names the structure 'putamen', which is none of background, Cortex",
        ),
        ("structure,tissue\n", "names no structure"),
        ("structure,tissue\n3,a\nCortex,b\n", "line 3 of .* names the structure 'Cortex' a second time"),
    ],
)
def test_tables_of_shared_tissues_that_cannot_be_read(tmp_path: Path, text: str, found: str) -> None:
    with pytest.raises(ValueError, match=found):
        read_shared_tissues(write(tmp_path, text), STRUCTURES)
