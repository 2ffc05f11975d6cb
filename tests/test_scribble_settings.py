import pytest

from limner.scribble_settings import Settings


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"width": 12}, "--width: 12 is no multiple of 8; give 8, 16, 24"),
        ({"fields": 5}, "--fields: 5 fields of view; give 1 to 4"),
        ({"gamma": -1.0}, "--gamma: -1.0 is not possible; give 0 or more"),
        ({"working_um": float("nan")}, "--working-um: nan is not possible; give a number above 0"),
        ({"sure": 0.5}, "--sure: 0.5 is no chance to be sure of"),
    ],
)
def test_refuses_settings_that_cannot_be(wrong, message):
    with pytest.raises(ValueError, match=message):
        Settings(**wrong).check()


def test_features_depend_on_what_the_network_is_trained_with_and_not_on_the_cut():
    usual = Settings().of_features()
    assert Settings(gamma=1.0, contrast=5.0, tau=3.0).of_features() == usual
    assert Settings(sure=0.9).of_features() != usual != Settings(walker_contrast=9.0).of_features()
