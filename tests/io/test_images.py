"""What `read` checks before any format does, and positions."""

import numpy as np
import pytest
import tifffile

from limner.io import read
from limner.io.volumes import VOLUME_ENDINGS


@pytest.fixture
def tif(tmp_path):
    tifffile.imwrite(tmp_path / "a.tif", np.zeros((3, 4, 5), np.uint8), photometric="minisblack")
    return tmp_path / "a.tif"


def test_missing_path(tmp_path):
    with pytest.raises(ValueError, match=r"^read\(\): .*none.nii.gz does not exist$"):
        read(tmp_path / "none.nii.gz")


def test_unknown_ending_names_those_known(tmp_path):
    (tmp_path / "a.dcm").write_bytes(b"")
    with pytest.raises(ValueError, match=r"a.dcm is of no known format; give a folder of PNG") as raised:
        read(tmp_path / "a.dcm")
    assert all(ending in str(raised.value) for ending in VOLUME_ENDINGS)


def test_section_axis(tif, make_folder):
    with pytest.raises(ValueError, match=r"section_axis is 'w'; give one of z, y, x, k, j, i"):
        read(tif, spacing=(1, 1, 1), section_axis="w")
    with pytest.raises(ValueError, match="leave section_axis out"):
        read(make_folder([np.zeros((4, 5), np.uint8)]), spacing=(1, 1, 1), section_axis="y")


@pytest.mark.parametrize(("long", "short"), [("z", "k"), ("y", "j"), ("x", "i")])
def test_nifti_names_of_the_section_axis(tif, long, short):
    shapes = {read(tif, spacing=(1, 1, 1), section_axis=axis).space.shape for axis in (long, short)}
    assert shapes == {{"z": (3, 4, 5), "y": (4, 3, 5), "x": (5, 3, 4)}[long]}


@pytest.mark.parametrize("spacing", [(1, 1), (0, 1, 1), (1, -1, 1), (1, float("nan"), 1)])
def test_wrong_spacing(tif, spacing):
    with pytest.raises(ValueError, match="spacing is"):
        read(tif, spacing=spacing)


def test_positions_of_a_volume(tif, tmp_path):
    (tmp_path / "z.csv").write_text("section,z\n0,1\n1,1.1\n2,1.4\n")
    space = read(tif, spacing=(9, 2, 3), positions=tmp_path / "z.csv").space
    assert space.positions == (1, 1.1, 1.4)
    assert space.spacing == (9, 2, 3)
