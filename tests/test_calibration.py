import math

import numpy as np
import pytest
import torch
from scipy.optimize import brute
from torch.nn import functional as F

from limner.calibration import (
    best_scale,
    first_within_one_standard_error,
    held_out_sections,
    mean_log_loss,
    temperature_scaling,
)


def test_mean_log_loss_is_cross_entropy():
    logits = torch.randn(4, 50, generator=torch.Generator().manual_seed(0))
    truth = torch.randint(0, 4, (50,), generator=torch.Generator().manual_seed(1))
    expected = F.cross_entropy(logits.T, truth).item()
    assert mean_log_loss(logits.log_softmax(dim=0), truth) == pytest.approx(expected, rel=1e-5)
    assert mean_log_loss(torch.tensor([[0.25], [0.75]]).log(), torch.tensor([0])) == pytest.approx(math.log(4))


@pytest.mark.parametrize("at", [0.2, 1.0, 40.0])
def test_best_scale_finds_the_minimum_on_a_logarithmic_scale(at):
    assert best_scale(lambda s: math.log(s / at) ** 2, 0.1, 100.0) == pytest.approx(at, rel=2e-3)


@pytest.mark.parametrize(("slope", "bound"), [(1, 0.1), (-1, 100.0)])
def test_best_scale_keeps_to_its_bounds(slope, bound):
    assert best_scale(lambda s: slope * s, 0.1, 100.0) == pytest.approx(bound, rel=5e-3)


def test_temperature_of_overconfident_probabilities_is_found():
    """Classes drawn from softmax(logits), then shown as softmax(3 logits): the best temperature is 3."""
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 20000, generator=generator)
    truth = torch.multinomial(logits.softmax(dim=0).T, 1, generator=generator)[:, 0]

    def loss(temperature):
        return mean_log_loss((3 * logits / temperature).log_softmax(dim=0), truth)

    found = best_scale(loss, 0.05, 50.0)
    assert found == pytest.approx(3, rel=0.05)
    assert loss(found) <= brute(lambda t: loss(t.item()), (slice(1, 6, 0.25),), finish=None, full_output=True)[1] + 1e-4
    assert np.isfinite(found)


@pytest.mark.parametrize("n", range(1, 60))
def test_held_out_sections_lie_inside(n):
    labelled = [10 * i for i in range(n)]
    found = held_out_sections(labelled)
    assert len(found) <= 6
    assert bool(found) == (n >= 3)
    assert not {labelled[0], labelled[-1]} & set(found)
    assert set(found) <= set(labelled)


def test_one_standard_error_by_hand():
    """Differences to the last choice: .03, .03 (no spread, so worse); .01 and .03 (mean .02, standard error .01)."""
    scores = [[0.87, 0.87], [0.89, 0.87], [0.88, 0.91], [0.9, 0.9]]
    assert first_within_one_standard_error(scores[:2] + scores[3:]) == 2
    assert first_within_one_standard_error(scores) == 2  # .02 and -.01: mean .005, standard error .015
    assert first_within_one_standard_error([[0.5], [0.5], [0.4]]) == 0  # one case: only what is as good


def test_temperature_scaling_undoes_a_wrong_temperature():
    generator = torch.Generator().manual_seed(0)
    log_p = torch.log_softmax(2 * torch.randn(4, 20000, generator=generator), dim=0)
    truth = torch.multinomial(log_p.exp().T, 1, generator=generator)[:, 0]
    found = temperature_scaling([(3 * log_p, truth)])
    assert found["temperature"] == pytest.approx(3, rel=0.05)
    assert found["ece_after"] < 0.02 < 0.1 < found["ece_before"]
