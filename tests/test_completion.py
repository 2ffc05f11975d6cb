import numpy as np

from limner.completion import suggest_sections


def test_suggestions_are_uncertain_inside_structures_and_apart():
    means = np.array([0.9, 0.1, 0.5, 0.6, 0.4, 0.2, 0.3, 0.0], dtype=np.float32)
    labels = np.zeros((8, 2, 2), int)
    labels[:, 0] = 5
    uncertainty = np.where(labels > 0, means[:, None, None], 0)
    uncertainty[5, 1] = 9.0  # background does not count
    assert suggest_sections(uncertainty, labels, [0]) == (3, 6, 1)  # 0 is labelled; 2 and 4 lie beside 3, 5 beside 6
    assert suggest_sections(uncertainty, labels, range(7)) == ()  # 7 is certain
    assert suggest_sections(uncertainty, np.zeros_like(labels), [0]) == ()
