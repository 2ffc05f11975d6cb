import pytest

from limner.io import read_positions

NAMES = ("s1.png", "s2.png", "s10.png")


@pytest.fixture
def table(tmp_path):
    def write(text, encoding="utf-8"):
        (tmp_path / "z.csv").write_text(text, encoding=encoding)
        return tmp_path / "z.csv"

    return write


@pytest.mark.parametrize(
    "text",
    [
        "s1.png,0\ns2.png,0.15\ns10.png,0.2\n",
        "section,z_mm\ns10,0.2\ns1,0\n\ns2,1.5e-1\n",
        "file;z\ns1.png;0\ns2.png;0.15\ns10.png;0.2",
        "s1.png\t0\ns2.png\t0.15\ns10.png\t0.2\n",
        "index,z\n0,0\n1,0.15\n2,0.2\n",
        '"s1.png", 0\n"s2.png", 0.15\n"s10.png", 0.2, sliced twice\n',
        "\ufeffs1.png,0\r\ns2.png,0.15\r\ns10.png,0.2\r\n",
    ],
)
def test_forms_of_the_table(table, text):
    assert read_positions(table(text), NAMES, 3) == (0, 0.15, 0.2)


def test_numbers_that_are_names_are_names(table):
    assert read_positions(table("1,0\n2,0.5\n"), ("1.png", "2.png"), 2) == (0, 0.5)
    assert read_positions(table("0,0\n1,0.5\n"), ("1.png", "2.png"), 2) == (0, 0.5)


def test_a_stack_without_names_goes_by_index(table):
    assert read_positions(table("1,2\n0,1\n"), (), 2) == (1, 2)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("s1,0\ns2,1\ns3,2\n", "line 3 of .* names section 's3', which the stack of 3 sections has not"),
        ("0,0\n1,1\n3,2\n", "line 3 of .* names section '3'"),
        ("s1,0\ns2,1\ns2.png,2\n", "line 3 of .* section 's2.png' a second time"),
        ("s1,0\ns10,1\n", "no row for section s2.png"),
        ("s1,0\ns2,near\ns10,2\n", "line 2 of .* has 'near' as position"),
        ("s1,near\ns2,1\ns10,2\n", "line 1 of .* has 'near' as position"),
        ("s1,0\ns2,inf\ns10,2\n", "'inf' as position"),
        ("s1,0\ns2,1\ns10,1\n", "section s2.png at 1 mm and the next, s10.png, at 1 mm; .* must increase"),
        ("s1,0\ns2,2\ns10,1\n", "must increase"),
        ("s1,0\ns2\ns10,1\n", "line 2 of .* fewer than two fields"),
        ("", "is empty"),
        ("section,z\n", "no row for section s1.png"),
    ],
)
def test_one_line_for_each_mistake(table, text, message):
    with pytest.raises(ValueError, match=r"^read_positions\(\): .*" + message) as raised:
        read_positions(table(text), NAMES, 3)
    assert "\n" not in str(raised.value)


def test_no_text(table, tmp_path):
    for path in (table("é,0\n", "latin-1"), tmp_path / "none.csv"):
        with pytest.raises(ValueError, match="cannot be read as text"):
            read_positions(path, NAMES, 3)
