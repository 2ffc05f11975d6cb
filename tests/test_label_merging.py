import numpy as np
import pytest

from limner.label_merging import Merging, each_label, merge_sides, read_merging
from limner.space import Space
from limner.volume import Label, LabelMap

COLOUR = (1, 2, 3)
TABLE = {n: Label(name, COLOUR) for n, name in {10: "Left-Thalamus", 49: "Right-Thalamus", 16: "Brain-Stem"}.items()}


def read_text(tmp_path, text, table=None):
    (tmp_path / "structures.csv").write_text(text)
    return read_merging(tmp_path / "structures.csv", table)


def test_table_by_numbers_ranges_and_names(tmp_path):
    text = (
        "structure,labels\n# protocol 3\nthalamus, Left-Thalamus,RIGHT-thalamus\n\n"
        '"cortex, all",3,42,1000-1003\nbackground,24,500-502\ncortex,\n'
    ).replace("cortex,\n", "")
    merging = read_text(tmp_path, text, TABLE)
    assert merging.structures == (
        ("background", (0, 24, 500, 501, 502)),
        ("thalamus", (10, 49)),
        ("cortex, all", (3, 42, 1000, 1001, 1002, 1003)),
    )
    assert merging.numbers == (0, 10, 3)


def test_labels_become_classes_and_numbers_of_structures():
    merging = Merging((("background", (0, 24)), ("thalamus", (49, 10)), ("stem", (16,))))
    labels = np.array([[[0, 24, 10], [49, 16, 16]]], np.int32)
    assert merging.to_classes(labels).tolist() == [[[0, 0, 1], [1, 2, 2]]]
    merged = merging.merge(LabelMap(labels, Space((1, 2, 3), (1.0, 1.0, 1.0)), TABLE))
    assert merged.labels.tolist() == [[[0, 0, 49], [49, 16, 16]]]
    assert merged.labels.dtype == np.int32
    assert merged.table == {49: Label("thalamus", COLOUR), 16: Label("stem", COLOUR)}


def test_more_than_256_structures():
    merging = each_label(range(300))
    classes = merging.to_classes(np.arange(300))
    assert classes.dtype == np.uint16
    assert np.array_equal(merging.to_labels(classes), np.arange(300))


def test_labels_that_the_table_does_not_know():
    merging = Merging((("background", (0,)), ("stem", (16,))))
    with pytest.raises(
        ValueError, match=r"^to_classes\(\): the labels hold .* no structure: 17; add them to the table"
    ):
        merging.to_classes(np.array([0, 16, 17]))
    with pytest.raises(ValueError, match=r"1.nii hold .* 100, 101, .*, 109 and 5 more; "):
        merging.to_classes(np.arange(100, 115), "1.nii")


@pytest.mark.parametrize(
    ("left", "right", "name"),
    [
        ("Left-Thalamus", "Right-Thalamus", "Thalamus"),
        ("left cerebral white matter", "right cerebral white matter", "cerebral white matter"),
        ("ctx-lh-insula", "ctx-rh-insula", "ctx-insula"),
        ("thalamus (left)", "thalamus (right)", "thalamus"),
        ("L_CA1", "R_CA1", "CA1"),
        ("CA1_L", "CA1_R", "CA1"),
    ],
)
def test_left_and_right_are_made_one_by_their_names(left, right, name):
    table = {7: Label(right, COLOUR), 5: Label(left, COLOUR), 9: Label("Leftover", COLOUR)}
    assert merge_sides([0, 5, 7, 9], table).structures == (
        ("background", (0,)),
        (name, (5, 7)),
        ("Leftover", (9,)),
    )


def test_one_side_alone_stays_as_it_is():
    table = {5: Label("Left-Lesion", COLOUR), 6: Label("Right-Vessel", COLOUR), 7: Label("Right-vessel", COLOUR)}
    names = merge_sides([5, 6, 7], table).names
    assert names == ("background", "Left-Lesion", "Right-Vessel", "Right-vessel")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "has no header"),
        ("name,labels\nstem,16\n", "has no header; let its first line be structure,labels"),
        ("structure,labels\nstem\n", "line 2 of .* names no label"),
        ("structure,labels\nstem,16\npons,16\n", "line 3 of .* gives label 16 to 'pons', which 'stem' has"),
        ("structure,labels\nstem,0\n", "line 2 of .* gives label 0 to 'stem', which 'background' has"),
        ("structure,labels\nstem,Brainstem\n", "line 2 of .* names the label 'Brainstem', which no label table names"),
    ],
)
def test_bad_tables(tmp_path, text, message):
    with pytest.raises(ValueError, match=rf"^read_merging\(\): .*{message}"):
        read_text(tmp_path, text, TABLE)


def test_table_that_is_no_text(tmp_path):
    (tmp_path / "a.csv").write_bytes(b"\xff\xfe\x00\x81")
    with pytest.raises(ValueError, match=r"^read_merging\(\): .*a.csv cannot be read as text"):
        read_merging(tmp_path / "a.csv")
    with pytest.raises(ValueError, match=r"cannot be read as text"):
        read_merging(tmp_path / "b.csv")
