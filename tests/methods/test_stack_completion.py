import math
import threading
from dataclasses import fields, replace
from itertools import pairwise
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn

import limner.methods.stack_completion as stack_completion
from limner import stack_settings
from limner.annotations import SectionLabels
from limner.calibration import held_out_sections
from limner.completion import pixels_between
from limner.fusion_scale import as_indices
from limner.fusion_stages import FITTED_LABELS
from limner.methods.stack_completion import (
    Model,
    SectionData,
    atlas_log_likelihood,
    bound,
    complete,
    e_step,
    gem,
    log_prior,
    objective,
    section_log_pd,
    weights_of,
)
from limner.pixel_classifier import network_log_probabilities
from limner.run_record import Store
from limner.section_fusion import FusionOptions, SectionFusion
from limner.space import Space
from limner.stack_scales import fit_weight
from limner.stack_settings import Settings
from limner.tiled_evidence import TiledEvidence
from limner.volume import LabelMap, Volume

SPACING = (0.1, 0.05, 0.05)
LABELLED = (0, 4, 8, 12)
QUICK = Settings(training_steps=10, local_steps=10, iterations=2, network_pixels=48, registration="none")
METHODS = ("network", "fusion", "product", "gem")


@pytest.fixture(scope="module")
def phantom(make_phantom):
    return make_phantom()


def annotated(labels, labelled=LABELLED, space=None):
    """Labels of some sections; the others hold a label that no section has, which must not be read."""
    given = np.full_like(labels, 99)
    given[list(labelled)] = labels[list(labelled)]
    return SectionLabels(LabelMap(given, space or Space(labels.shape, SPACING)), labelled)


def completed(phantom, settings=QUICK, labelled=LABELLED, space=None, jobs=2, **options):
    images, labels = phantom
    space = space or Space(labels.shape, SPACING)
    annotations = annotated(labels, labelled, space)
    return complete(Volume(images, space), annotations, settings, device="cpu", jobs=jobs, **options)


def accuracy(predicted, truth, labelled=LABELLED):
    unlabelled = [z for z in range(len(truth)) if z not in labelled]
    return float((predicted[unlabelled] == truth[unlabelled]).mean())


def nearest_copy(labels, labelled=LABELLED):
    return labels[[min(labelled, key=lambda a: abs(a - z)) for z in range(len(labels))]]


# ---- the equations --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("weight", "expected"),
    [
        (1.0, (0.2 * 0.5, 0.8 * 0.25, 0.0)),
        (2.0, (0.2**2 * 0.5, 0.8**2 * 0.25, 0.0)),
        (0.0, (0.5, 0.25, 0.25)),
    ],
)
def test_e_step_is_the_normalised_product(weight, expected):
    log_pd = torch.tensor([0.2, 0.8, 1e-30]).log().view(3, 1, 1)
    log_pf = torch.tensor([0.5, 0.25, 0.25]).log().view(3, 1, 1)
    w = e_step(log_pd, log_pf + 3.0, weight).exp().flatten()  # a constant a pixel does not matter
    torch.testing.assert_close(w, torch.tensor(expected) / sum(expected))


def linear_top(weights=((1.0, 0.5), (-0.3, 0.2)), biases=(0.1, -0.2)):
    """Two classes from two features."""
    top = nn.Conv2d(2, 2, 1)
    with torch.no_grad():
        top.weight.copy_(torch.tensor(weights)[:, :, None, None])
        top.bias.copy_(torch.tensor(biases))
    return top


def random_data(seed=0, classes=2, features=2, shape=(5, 6), frequency=None, learnt=0.0):
    """Random features, atlas targets (some unknown) and log p_f; all weights learnt are the same."""
    generator = torch.Generator().manual_seed(seed)
    inputs, atlases = (torch.randn(n, features, *shape, generator=generator) for n in (1, 2))
    targets = torch.randint(-1, classes, (2, *shape), generator=generator)
    log_pf = torch.randn(classes, *shape, generator=generator).log_softmax(dim=0)
    data = SectionData(inputs, atlases, targets, log_pf, learnt=torch.tensor(learnt))
    if frequency is not None:
        data.log_frequency = torch.tensor(frequency).log().view(-1, 1, 1)
    return data


@pytest.mark.parametrize("frequency", [None, (0.9, 0.1)])
def test_objective_is_equation_1(frequency):
    top, data, weight, prior = linear_top(), random_data(frequency=frequency, learnt=0.1), 1.7, 1e-3

    def log_pd(features):  # (2, y, x)
        matrix, bias = np.array([[1.0, 0.5], [-0.3, 0.2]]), np.array([0.1, -0.2])
        logits = np.einsum("lc,cyx->lyx", matrix, features.numpy().astype(float)) + bias[:, None, None]
        return logits - np.log(np.exp(logits).sum(axis=0))

    expected = -prior * 30 * (0.9**2 + 0.4**2 + 0.4**2 + 0.1**2 + 0.0**2 + 0.3**2)  # 30 pixels
    for features, targets in zip(data.atlas_inputs, data.atlas_targets.numpy(), strict=True):
        log_probabilities = log_pd(features)
        expected += weight * sum(log_probabilities[t, y, x] for (y, x), t in np.ndenumerate(targets) if t >= 0)
    p_d, p_f = np.exp(log_pd(data.inputs[0])), data.log_pf.exp().numpy()
    if frequency:  # of the section alone, and a distribution again
        p_d = p_d / np.reshape(frequency, (-1, 1, 1))
        p_d = p_d / p_d.sum(axis=0)
    expected += np.log((p_d**weight * p_f).sum(axis=0)).sum()
    assert objective(top, data, weight, prior) == pytest.approx(expected, rel=1e-5)


def minorant(top, data, w, weight, prior):
    """lambda times Eq. 3, with what does not depend on theta: sum w log p_f and the entropy of w."""
    constant = (w * data.log_pf).sum() - torch.special.xlogy(w, w).sum()
    return weight * bound(top, data, w, weight, prior).item() + constant.item()


@pytest.mark.parametrize("frequency", [None, (0.9, 0.1)])
def test_bound_touches_the_objective_at_the_e_step_and_lies_below_it_elsewhere(frequency):
    data, weight, prior = random_data(frequency=frequency, learnt=0.1), 1.7, 1e-3
    top = linear_top()
    w = e_step(section_log_pd(top, data).detach(), data.log_pf, weight).exp()
    assert minorant(top, data, w, weight, prior) == pytest.approx(objective(top, data, weight, prior), abs=1e-3)
    for seed in range(5):
        torch.manual_seed(seed)
        other = nn.Conv2d(2, 2, 1)
        assert minorant(other, data, w, weight, prior) < objective(other, data, weight, prior) - 1e-2


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize(("weight", "rate"), [(0.1, 1e-2), (2.0, 1e-2), (2.0, 3.0)])
def test_gem_never_lets_the_objective_fall(seed, weight, rate, monkeypatch):
    """Not even where Adam begins with steps that are far too long."""
    monkeypatch.setattr(stack_completion, "first_rate", lambda _top: rate)
    torch.manual_seed(seed)
    top, data = nn.Conv2d(3, 4, 1), random_data(seed, classes=4, features=3, shape=(9, 9))
    settings = Settings(iterations=25, m_steps=5)
    history = gem(top, data, weight, settings)
    assert len(history) > 1
    assert all(after >= before for before, after in pairwise(history))
    assert history[-1] == pytest.approx(objective(top, data, weight, settings.gem_prior))


def test_gem_stops_when_nothing_changes():
    """Evidence so sure that no pixel can change class: one iteration is enough."""
    data = random_data()
    data.log_pf = torch.where(torch.arange(2).view(2, 1, 1) == 1, 0.0, -50.0).expand(2, 5, 6)
    assert len(gem(linear_top(), data, 1.0, Settings(iterations=50))) == 2


def test_gem_does_not_call_everything_the_rarest_structure():
    """Evidence that knows nothing and a structure of one pixel in ten thousand: as common as the network says."""
    data = random_data(shape=(20, 20), frequency=(0.9999, 0.0001))
    data.log_pf = torch.zeros(2, 20, 20)
    data.atlas_targets[:] = 0
    data.atlas_targets[:, 0, 0] = 1
    top = linear_top(((0.0, 0.0), (0.0, 0.0)), (5.0, -5.0))
    gem(top, data, 1.2, Settings(iterations=20, m_steps=100))
    assert network_log_probabilities(top, data.inputs)[0, 1].exp().mean() < 0.05


def test_gem_takes_back_a_step_that_lowers_the_objective(monkeypatch):
    top, data, rates = linear_top(), random_data(), []
    before = {name: weight.clone() for name, weight in top.state_dict().items()}

    def worse(top, _data, _w, _weight, _settings, rate):
        rates.append(rate)
        with torch.no_grad():
            top.weight.mul_(-20)

    monkeypatch.setattr(stack_completion, "m_step", worse)
    history = gem(top, data, 2.0, Settings(iterations=50))
    assert len(history) == 1
    assert rates[:3] == [1e-2, 1e-2 / 4, 1e-2 / 16]
    assert len(rates) < 10
    for name, weight in top.state_dict().items():
        assert torch.equal(weight, before[name])


def test_a_whole_network_learns_slower_than_a_last_layer(monkeypatch):
    """FCN-8s is moved whole whatever `trained_layers` says: the rate follows what is moved."""
    rates = []
    monkeypatch.setattr(stack_completion, "m_step", lambda *arguments: rates.append(arguments[-1]))
    for top in (linear_top(), nn.Sequential(linear_top())):
        gem(top, random_data(), 1.0, Settings(iterations=1))
    assert rates == [1e-2, 1e-4]


def test_unknown_pixels_of_atlases_give_no_loss_and_no_gradient():
    top, data = linear_top(), random_data()
    inputs = data.atlas_inputs.clone().requires_grad_()
    targets = torch.full_like(data.atlas_targets, -1)
    found = atlas_log_likelihood(top, inputs, targets)
    found.backward()
    assert found.item() == 0
    assert not top.weight.grad.any()
    assert not inputs.grad.any()
    targets[0, 2, 3] = 1
    atlas_log_likelihood(top, inputs, targets).backward()
    assert inputs.grad.abs().sum(dim=1).nonzero().tolist() == [[0, 2, 3]]


def test_log_prior_is_the_squared_distance_to_what_was_learnt():
    data = random_data(shape=(2, 5))
    assert log_prior(linear_top(), data, 0.5).item() == pytest.approx(-10 * 0.5 * 1.43)
    data.learnt = torch.tensor((1.0, 0.5, -0.3, 0.2, 0.1, -0.2))
    assert log_prior(linear_top(), data, 0.5).item() == 0


def test_a_strong_prior_keeps_what_was_learnt():
    moved = {}
    for prior in (0.0, 100.0):
        top, data = linear_top(), random_data(shape=(9, 9))
        data.learnt = start = weights_of(top).detach()
        gem(top, data, 1.0, Settings(gem_prior=prior))
        moved[prior] = (weights_of(top) - start).norm().item()
    assert moved[100.0] < 0.05 * moved[0.0]


# ---- a whole stack --------------------------------------------------------------------------------------------------


def test_a_mirror_image_that_is_not_asked_is_noted_and_changes_nothing(phantom):
    """Of three labelled sections it cannot be told whether it helps."""
    settings = replace(QUICK, method="fusion")
    without, found = (completed(phantom, replace(settings, mirror=m), labelled=(0, 6, 12)) for m in (False, True))
    assert found.calibration["mirror"] == 0
    assert "mirror" not in without.calibration
    assert set(found.notes) - set(without.notes) == {
        "The mirror image was not asked: left-out sections come out no better with it."
    }
    np.testing.assert_array_equal(found.labels.labels, without.labels.labels)


@pytest.mark.parametrize("method", METHODS)
def test_complete(phantom, method):
    labels = phantom[1]
    found = completed(phantom, replace(QUICK, method=method), keep_probabilities=True)
    assert found.labels.labels.dtype == labels.dtype
    np.testing.assert_array_equal(found.labels.labels[list(LABELLED)], labels[list(LABELLED)])
    assert set(np.unique(found.labels.labels)) <= {0, 3, 7}
    assert sorted(found.sections) == [z for z in range(13) if z not in LABELLED]
    assert not found.uncertainty[list(LABELLED)].any()
    assert np.isfinite(found.uncertainty).all()
    assert 0 <= found.uncertainty.min() < found.uncertainty.max() <= 1
    assert found.suggestions
    assert not set(found.suggestions) & set(LABELLED)
    assert {"temperature", "ece_before", "ece_after", "area_width"} <= set(found.calibration)
    assert not found.wrong[list(LABELLED)].any()
    assert (found.wrong[[z for z in range(13) if z not in LABELLED]] > 0).all()
    for section in found.sections.values():
        assert section.structures.tolist() == [0, 3, 7]
        np.testing.assert_allclose(section.probabilities.astype(float).sum(axis=0), 1, atol=3e-3)
        np.testing.assert_allclose(1 - section.probabilities.max(axis=0), section.uncertainty, atol=1e-3)
        assert section.iterations == 0 if method != "gem" else len(section.objective) == section.iterations + 1
        assert all(b >= a for a, b in pairwise(section.objective))


@pytest.mark.parametrize(
    ("options", "share"),
    [
        ({"registration": "chained"}, 0.15),
        ({}, 0.35),
        ({"interpolation": "linear"}, 0.35),
        ({"fusion": "normalised"}, 0.6),
        ({"fusion": "printed"}, 0.6),
    ],
)
def test_fusion_leaves_a_share_of_the_errors_of_copying_the_nearest_labelled_section(phantom, options, share):
    labels = phantom[1]
    found = completed(phantom, replace(QUICK, method="fusion", **options)).labels.labels
    errors, errors_of_copy = 1 - accuracy(found, labels), 1 - accuracy(nearest_copy(labels), labels)
    assert errors_of_copy > 0.03
    assert errors < errors_of_copy * share


@pytest.mark.parametrize("registration", ["chained", "direct"])
def test_registration_carries_labels_onto_sections_that_lie_elsewhere(phantom, registration):
    """Sections shifted by turns: without registration the structures do not meet."""
    labelled = (0, 3, 6)
    images, labels = (np.stack([np.roll(s, 4 * (z % 2), axis=1) for z, s in enumerate(a[:7])]) for a in phantom)
    settings = replace(QUICK, method="fusion", start="rigid")
    errors = {
        kind: 1
        - accuracy(
            completed((images, labels), replace(settings, registration=kind), labelled).labels.labels, labels, labelled
        )
        for kind in ("none", registration)
    }
    assert errors[registration] < 0.5 * errors["none"]


@pytest.mark.parametrize("method", ["fusion", "gem"])
@pytest.mark.parametrize("labelled", [(4, 8), (6,)])
def test_few_labelled_sections(phantom, labelled, method):
    labels = phantom[1]
    found = completed(phantom, replace(QUICK, method=method), labelled)
    np.testing.assert_array_equal(found.labels.labels[list(labelled)], labels[list(labelled)])
    assert np.isfinite(found.uncertainty).all()
    assert accuracy(found.labels.labels, labels, labelled) > 0.85
    assert any("calibrate" in note for note in found.notes)
    beyond = 13 - (labelled[-1] - labelled[0] + 1)
    assert any(note.startswith(f"{beyond} sections lie outside") for note in found.notes)


def test_one_labelled_section_without_registration_is_copied(phantom):
    found = completed(phantom, replace(QUICK, method="fusion"), (6,))
    for z in range(13):
        np.testing.assert_array_equal(found.labels.labels[z], phantom[1][6])


def test_a_completely_labelled_stack_comes_back(phantom):
    found = completed(phantom, labelled=tuple(range(13)))
    np.testing.assert_array_equal(found.labels.labels, phantom[1])
    assert not found.uncertainty.any()
    assert (found.sections, found.suggestions) == ({}, ())


def test_colour(phantom):
    images, labels = phantom
    colour = np.stack([images, 255 - images, np.full_like(images, 40)], axis=-1).clip(0, 255).astype(np.uint8)
    for settings in (QUICK, replace(QUICK, method="fusion", fusion="normalised")):
        assert accuracy(completed((colour, labels), settings).labels.labels, labels) > 0.9


def test_a_section_near_the_upper_label_resembles_it_more(phantom):
    """Section 2 lies between the labelled sections 0 and 4, once in the middle and once close to 4."""

    def agreement(positions):
        space = Space((5, 48, 56), SPACING, positions=positions)
        few = tuple(array[:5] for array in phantom)
        return (completed(few, replace(QUICK, method="fusion"), (0, 4), space).labels.labels[2] == few[1][4]).mean()

    assert agreement((0.0, 0.1, 0.38, 0.39, 0.4)) > agreement((0.0, 0.1, 0.2, 0.3, 0.4)) + 0.01


def test_pixels_that_are_not_square(phantom):
    """Every other row: the same structures at twice the spacing along y."""
    images, labels = (array[:, ::2] for array in phantom)
    found = completed(
        (images, labels), replace(QUICK, registration="chained"), space=Space(labels.shape, (0.1, 0.1, 0.05))
    )
    assert np.isfinite(found.uncertainty).all()
    assert accuracy(found.labels.labels, labels) > accuracy(nearest_copy(labels), labels)


def test_an_empty_section_is_noted_and_gives_numbers(phantom):
    images = phantom[0].copy()
    images[6] = 0
    found = completed((images, phantom[1]), replace(QUICK, registration="chained", start="none"))
    assert any("Section 6 is blank" in note for note in found.notes)
    assert np.isfinite(found.uncertainty).all()
    assert accuracy(found.labels.labels, phantom[1]) > 0.9


def test_tissues_that_the_stack_lacks_do_no_harm(phantom):
    """An ontology names more structures than a stack shows."""
    found = completed(phantom, tissues={3: 5, 5: 1, 7: 9})
    assert accuracy(found.labels.labels, phantom[1]) > 0.9


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_the_same_seed_gives_the_same_labels_however_many_at_once(phantom, method):
    settings = replace(QUICK, method=method)
    first, again, alone = (completed(phantom, settings, jobs=jobs, keep_probabilities=True) for jobs in (2, 2, 1))
    np.testing.assert_array_equal(first.labels.labels, again.labels.labels)
    np.testing.assert_array_equal(first.labels.labels, alone.labels.labels)
    for z, section in first.sections.items():
        np.testing.assert_array_equal(section.probabilities, again.sections[z].probabilities)
        np.testing.assert_allclose(section.probabilities, alone.sections[z].probabilities, atol=1e-4)


@pytest.mark.parametrize("jobs", [1, 2, 9])
def test_local_training_is_done_once_a_gap(phantom, monkeypatch, jobs):
    """Three gaps of three sections; before these once around the section that is left out to fit the scales."""
    calls, original = [], stack_completion.train_locally

    def spy(top, inputs, targets, settings):
        calls.append(weights_of(top).sum().item())
        original(top, inputs, targets, settings)

    monkeypatch.setattr(stack_completion, "train_locally", spy)
    completed(phantom, jobs=jobs)
    assert len(calls) == 4
    assert len(set(calls)) == 2  # from the network of all but the section left out, then from that of all


def test_gem_on_one_section_leaves_the_others_alone(phantom):
    """Each begins with what local training found, not with what GEM made of it for a section before."""
    images, labels = phantom
    fusion = SectionFusion(
        images[:, None], labels.astype(np.int32), LABELLED, 0.1 * np.arange(13), (0.05, 0.05), FusionOptions()
    )
    model, _, _ = stack_completion.fit(QUICK, fusion)
    top, data = model.section_data(5)
    before = weights_of(top).detach().clone()
    with torch.no_grad():
        top.weight.add_(1.0)
    again, same = model.section_data(6)
    torch.testing.assert_close(weights_of(again).detach(), before)
    torch.testing.assert_close(same.learnt, before)
    torch.testing.assert_close(data.learnt, before)
    assert not torch.equal(data.inputs, same.inputs)


def test_gem_holds_to_what_was_learnt_or_to_zero(phantom):
    """The paper's prior is centred on zero: with a strong one GEM then leaves a last layer of hardly any weight."""
    images, labels = phantom
    fusion = SectionFusion(
        images[:, None], labels.astype(np.int32), LABELLED, 0.1 * np.arange(13), (0.05, 0.05), FusionOptions()
    )
    moved = {}
    for centre in ("learnt", "zero"):
        settings = replace(QUICK, gem_centre=centre, gem_prior=10.0, m_steps=60)
        model, _, _ = stack_completion.fit(settings, fusion)
        top, data = model.section_data(5)
        learnt = weights_of(top).detach().clone()
        data.log_pf = torch.zeros(len(fusion.structures(5)), *data.inputs.shape[2:])
        stack_completion.gem(top, data, model.weight(5), settings)
        moved[centre] = float((weights_of(top).detach() - learnt).norm() / learnt.norm())
    assert moved["learnt"] < 0.1
    assert moved["zero"] > 0.3


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_a_section_that_is_found_to_lie_elsewhere_is_done_again(phantom, tmp_path, method):
    """The last lies beyond all labels: the further, the less sure."""
    few = tuple(array[:6] for array in phantom)
    settings = replace(QUICK, method=method)
    unsure = {}
    for store in (None, Store(tmp_path)):
        for last in (0.5, 1.5):
            space = Space(few[1].shape, SPACING, positions=(0.0, 0.1, 0.2, 0.3, 0.4, last))
            found = completed(few, settings, (0, 2, 4), space=space, jobs=1, store=store)
            unsure[store is None, last] = found.uncertainty[5].mean()
    assert unsure[True, 1.5] > unsure[True, 0.5]
    for last in (0.5, 1.5):
        assert unsure[False, last] == pytest.approx(unsure[True, last], rel=1e-5)


def test_lambda_follows_the_evidence_that_is_right(phantom, monkeypatch):
    """A network that knows the truth gets much weight, one that knows nothing the least."""
    images, labels = phantom
    fusion = SectionFusion(
        images[:, None], labels.astype(np.int32), LABELLED, 0.1 * np.arange(13), (0.05, 0.05), FusionOptions(rho=30.0)
    )
    model = Model(replace(QUICK, divide_by_frequency=False), fusion)

    def weight(says):
        def evidence(_, z, left_out):
            assert left_out == z
            return TiledEvidence.of_all(says(as_indices(fusion, z, [0, 3, 7])))

        monkeypatch.setattr(Model, "network_evidence", evidence)
        return fit_weight(model, (4, 8)) * fusion.spread(4, 4) ** 2

    assert weight(lambda truth: torch.zeros(3, *truth.shape)) == pytest.approx(0.02)  # no weight does better
    one_hot = torch.eye(3)
    assert weight(lambda truth: (0.9 * one_hot[truth].permute(2, 0, 1) + 0.03).log()) > 0.5
    assert weight(lambda truth: (0.9 * one_hot[(truth + 1) % 3].permute(2, 0, 1) + 0.03).log()) < 0.05


# ---- going on where it stopped --------------------------------------------------------------------------------------


@pytest.fixture
def recomputed(monkeypatch):
    """The sections that were computed rather than read, in order."""
    computed, lock, original = [], threading.Lock(), Model.complete_section

    def spy(self, z, keep_probabilities):
        with lock:
            computed.append(z)
        return original(self, z, keep_probabilities)

    monkeypatch.setattr(Model, "complete_section", spy)
    return computed


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_an_interrupted_run_goes_on_where_it_stopped(phantom, method, tmp_path, recomputed):
    settings = replace(QUICK, method=method)
    whole = completed(phantom, settings, jobs=1, keep_probabilities=True)
    assert len(recomputed) == 9
    recomputed.clear()

    def interrupt(stage, done, _total):
        if stage == "sections" and done == 3:
            raise KeyboardInterrupt

    store = Store(tmp_path)
    with pytest.raises(KeyboardInterrupt):
        completed(phantom, settings, jobs=1, store=store, progress=interrupt, keep_probabilities=True)
    finished = {int(stage.split("-")[1]) for stage in store.stages() if stage.startswith("section-")}
    assert 3 <= len(finished) < 9
    recomputed.clear()
    trained = []
    resumed = completed(
        phantom,
        settings,
        jobs=1,
        store=store,
        progress=lambda stage, *_: trained.append(stage),
        keep_probabilities=True,
    )
    assert set(recomputed) == set(whole.sections) - finished
    assert "training" not in trained
    np.testing.assert_array_equal(resumed.labels.labels, whole.labels.labels)
    np.testing.assert_array_equal(resumed.uncertainty, whole.uncertainty)
    assert resumed.calibration == whole.calibration
    for z, section in whole.sections.items():
        np.testing.assert_array_equal(resumed.sections[z].probabilities, section.probabilities)
        assert resumed.sections[z].objective == section.objective


def corrected(labels, z):
    changed = labels.copy()
    changed[z, 10:20, 30:40] = 7
    return changed


@pytest.mark.parametrize(
    ("labelled", "corrects", "redone"),
    [
        ((4, 8), 8, {5, 6, 7, 9, 10, 11, 12}),  # too few to calibrate on
        ((0, 2, 4, 6, 8, 10, 12), 10, {9, 11}),  # calibrated on 4, from 2 and 6
    ],
)
def test_a_correction_redoes_the_sections_that_it_speaks_for(phantom, tmp_path, recomputed, labelled, corrects, redone):
    images, labels = phantom
    settings = replace(QUICK, method="fusion", rho=30.0, interpolation="linear")
    store = Store(tmp_path)
    completed(phantom, settings, labelled, store=store)
    recomputed.clear()
    after = completed((images, corrected(labels, corrects)), settings, labelled, store=store)
    assert set(recomputed) == redone
    fresh = completed((images, corrected(labels, corrects)), settings, labelled)
    np.testing.assert_array_equal(after.labels.labels, fresh.labels.labels)


EVERY_THIRD = (0, 3, 6, 9, 12)


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_who_corrects_one_section_waits_for_those_it_speaks_for(phantom, method, tmp_path, recomputed):
    """rho, the network, lambda and the temperature are fitted, and stay."""
    images, labels = phantom
    settings, store, begun = replace(QUICK, method=method), Store(tmp_path), []

    def run(labels, labelled=EVERY_THIRD, store=store):
        begun.clear()
        recomputed.clear()
        noted = {"store": store, "progress": lambda stage, *_: begun.append(stage)}
        return completed((images, labels), settings, labelled, **noted)

    before = run(labels)
    assert ("training" in begun) == (method == "gem")
    assert not before.notes

    changed = corrected(labels, 12)
    after = run(changed)
    assert "training" not in begun
    assert set(recomputed) == {7, 8, 10, 11}  # between labelled sections of which 12 is one of the four nearest
    assert after.calibration == before.calibration
    assert after.notes == (
        "Labels changed, added or taken away since the fit to the labels: section 12. The fit was kept (--refit makes "
        "it anew). Done again: sections 7, 8, 10, 11.",
    )
    assert (after.labels.labels[11] != before.labels.labels[11]).any()
    np.testing.assert_array_equal(after.labels.labels[12], changed[12])
    assert not run(labels).notes  # as they were

    run(changed)
    store.remove(FITTED_LABELS)
    again, anew = run(changed), run(changed, store=None)
    assert not again.notes
    assert again.calibration == anew.calibration != before.calibration
    np.testing.assert_array_equal(again.labels.labels, anew.labels.labels)


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_scales_that_were_fitted_to_limners_own_labels_are_not_kept(phantom, method, tmp_path):
    """A section that was taken over from a result agrees with fusion; then it is corrected."""
    images, labels = phantom
    settings = replace(QUICK, method=method, training_steps=2)
    assert held_out_sections(EVERY_THIRD) == (6,)
    others = completed(phantom, replace(settings, method="fusion"), (0, 3, 9, 12)).labels.labels
    taken_over, store = labels.copy(), Store(tmp_path)
    taken_over[6] = others[6]
    sure = completed((images, taken_over), settings, EVERY_THIRD, store=store)
    fresh = completed(phantom, settings, EVERY_THIRD)
    assert fresh.calibration["temperature"] > 1.5 * sure.calibration["temperature"]
    again = completed(phantom, settings, EVERY_THIRD, store=store)
    assert not again.notes
    assert again.calibration == fresh.calibration
    np.testing.assert_array_equal(again.uncertainty, fresh.uncertainty)


def test_a_fit_that_was_partly_replaced_is_not_stood_on(phantom, tmp_path, monkeypatch):
    """Stopped while it was fitted to other labels, the stages of two fits lie side by side."""
    images, labels = phantom
    settings, store = replace(QUICK, method="gem"), Store(tmp_path)
    other, slightly = corrected(corrected(labels, 12), 9), corrected(labels, 6)
    fresh = completed((images, slightly), settings, EVERY_THIRD)
    completed(phantom, settings, EVERY_THIRD, store=store)
    train, trained = stack_completion.train_globally, []

    def stopped(*given):
        if trained:
            raise KeyboardInterrupt
        trained.append(1)
        return train(*given)

    with monkeypatch.context() as patch:
        patch.setattr(stack_completion, "train_globally", stopped)
        with pytest.raises(KeyboardInterrupt):
            completed((images, other), settings, EVERY_THIRD, store=store)
    again = completed((images, slightly), settings, EVERY_THIRD, store=store)
    assert not again.notes
    assert again.calibration == fresh.calibration
    np.testing.assert_array_equal(again.uncertainty, fresh.uncertainty)


@pytest.mark.parametrize("stage", ["rho", "network-1", "calibration", "network-2"])
def test_a_fit_of_which_a_stage_is_lost_is_not_stood_on(phantom, tmp_path, stage):
    images, labels = phantom
    settings, store = replace(QUICK, method="gem"), Store(tmp_path)
    completed(phantom, settings, EVERY_THIRD, store=store)
    assert stage in store.stages()
    (tmp_path / f"{stage}.npz").write_bytes(b"")
    assert not completed((images, corrected(labels, 12)), settings, EVERY_THIRD, store=store).notes


@pytest.mark.parametrize("change", ["two of five sections", "a new structure", "a structure less"])
def test_the_fit_is_made_anew_where_labels_are_others(phantom, change, tmp_path):
    images, labels = phantom
    settings, store = replace(QUICK, method="fusion"), Store(tmp_path)
    other = corrected(labels, 12)
    if change == "two of five sections":
        other = corrected(other, 9)
    else:
        other[12, 10:20, 30:40] = 9
    given = [other, labels] if change == "a structure less" else [labels, other]
    before, after = (completed((images, each), settings, EVERY_THIRD, store=store) for each in given)
    assert not after.notes
    assert after.calibration != before.calibration
    assert after.calibration == completed((images, given[1]), settings, EVERY_THIRD).calibration


@pytest.mark.parametrize("change", ["image", "position"])
def test_mixtures_are_redone_when_an_atlas_looks_or_lies_otherwise(phantom, tmp_path, recomputed, change):
    """They compare grey levels with the atlas and decay with the distance to it."""
    images, labels = phantom
    settings = replace(QUICK, method="fusion", fusion="normalised")
    store = Store(tmp_path)
    completed(phantom, settings, (4, 8), store=store)
    recomputed.clear()
    space = Space(labels.shape, SPACING)
    if change == "image":
        images = images.copy()
        images[4, 10:30, 10:40] = images[4, 29:9:-1, 10:40]  # the same values elsewhere: the grey scale stays
        expected = set(range(8)) - {4}
    else:
        space = replace(space, positions=(*(0.1 * np.arange(12)).tolist(), 1.3))
        expected = {12}
    completed((images, labels), settings, (4, 8), space, store=store)
    assert set(recomputed) == expected


@pytest.mark.parametrize("method", ["fusion", "gem"])
def test_stages_of_another_algorithm_are_made_anew(phantom, method, tmp_path, recomputed, monkeypatch):
    settings = replace(QUICK, method=method, registration="chained")
    few = tuple(array[:5] for array in phantom)
    begun, store = [], Store(tmp_path)

    def again():
        begun.clear()
        recomputed.clear()
        completed(few, settings, (0, 2, 4), store=store, progress=lambda stage, *_: begun.append(stage))
        return {*begun} - {"label flow", "sections"}, sorted(recomputed)  # these two are told when they are read, too

    computed = {"checking sections", "registration"} | ({"training"} if method == "gem" else set())
    assert again() == (computed, [1, 3])
    assert again() == (set(), [])
    calibration = (tmp_path / "calibration.npz").read_bytes()
    monkeypatch.setattr(stack_settings, "ALGORITHM", stack_settings.ALGORITHM + 1)
    assert again() == (computed, [1, 3])
    assert (tmp_path / "calibration.npz").read_bytes() != calibration  # its key is another


def test_networks_are_trained_anew_when_the_file_of_weights_is_replaced(tmp_path, monkeypatch):
    trained = []
    monkeypatch.setattr(stack_completion, "make_classifier", lambda *_: SimpleNamespace(load=lambda _: None))
    monkeypatch.setattr(stack_completion, "train_globally", lambda *_: trained.append(1) or {"w": np.zeros(1)})
    images, labels = np.zeros((3, 1, 8, 8), np.float32), np.ones((3, 8, 8), np.int32)
    fusion = SectionFusion(images, labels, (0, 2), 0.1 * np.arange(3), (0.05, 0.05), FusionOptions(rho=30.0))

    def trains(name, content):
        trained.clear()
        (tmp_path / name).write_bytes(content)
        settings = Settings(rho=30.0, network="fcn_vgg16", vgg16_weights=str(tmp_path / name))
        stack_completion.fit(settings, fusion, store=Store(tmp_path / "stages"))
        return len(trained)

    assert [trains("a.pth", b"1"), trains("a.pth", b"1"), trains("a.pth", b"2")] == [2, 0, 2]
    assert trains("b.pth", b"2") == 0  # the same file elsewhere


# ---- what cannot be done --------------------------------------------------------------------------------------------


def test_images_and_labels_must_lie_on_one_grid(phantom):
    images, labels = phantom
    volume, space = Volume(images, Space(labels.shape, SPACING)), Space(labels.shape, (0.1, 0.04, 0.05))
    with pytest.raises(ValueError, match=r"complete\(\): labels have spacing .*0\.04"):
        complete(volume, annotated(labels, space=space), QUICK)
    with pytest.raises(ValueError, match=r"complete\(\): labels have shape \(13, 48, 50\)"):
        complete(volume, annotated(labels[:, :, :50]), QUICK)


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_images_must_be_numbers(phantom, value):
    images = phantom[0].copy()
    images[3, 5, 5] = value
    with pytest.raises(ValueError, match="NaN or infinity"):
        completed((images, phantom[1]))


def test_some_labelled_section_must_hold_a_structure(phantom):
    with pytest.raises(ValueError, match="background only"):
        completed((phantom[0], np.zeros_like(phantom[1])))


@pytest.mark.parametrize(
    ("device", "found"),
    [("cuda", "device is 'cuda', but torch finds no CUDA GPU"), ("gpu", "device is 'gpu'; give"), ("cuda:1", "give")],
)
def test_the_device_must_be_there(phantom, monkeypatch, device, found):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    images, labels = phantom
    with pytest.raises(ValueError, match=rf"^complete\(\): .*{found}"):
        complete(Volume(images, Space(labels.shape, SPACING)), annotated(labels), QUICK, device=device)


def test_auto_takes_a_gpu_where_there_is_one(monkeypatch):
    for available, expected in ((False, ["cpu", "cpu"]), (True, ["cuda", "cpu"])):
        monkeypatch.setattr(torch.cuda, "is_available", lambda available=available: available)
        assert [stack_completion.chosen_device(device) for device in ("auto", "cpu")] == expected


def test_every_number_in_the_settings_has_a_range():
    numbers = {f.name for f in fields(Settings) if isinstance(f.default, int | float) and f.type != "bool"}
    assert set(stack_settings.LOWEST) == numbers
    assert all(lowest <= getattr(Settings(), name) for name, lowest in stack_settings.LOWEST.items())


@pytest.mark.parametrize(
    ("name", "allowed", "refused"),
    [
        ("network_pixels", 1, 0),
        ("training_steps", 1, 0),
        *((name, 0, -1) for name in ("local_steps", "iterations", "m_steps", "seed", "stiffness", "rho", "alpha")),
        *((name, 0.0, -1e-9) for name in ("placement", "halved", "weight_of_network", "prior", "gem_prior")),
        *((name, 0.01, 0.0) for name in ("sigma", "clip_mm")),
    ],
)
def test_numbers_out_of_range_are_refused(name, allowed, refused):
    replace(Settings(), **{name: allowed}).check()
    for value in (refused, math.nan, math.inf, -math.inf):
        with pytest.raises(ValueError, match=rf"^Settings\(\): {name} is {value}; give a number from [^\n]*$"):
            replace(Settings(), **{name: value}).check()


def test_names_that_are_no_choice_are_refused():
    with pytest.raises(ValueError, match=r"^Settings\(\): method is 'gme'; give one of network, fusion, product, gem$"):
        replace(Settings(), method="gme").check()


@pytest.mark.parametrize("none", ["local_steps", "iterations", "m_steps"])
def test_no_steps_leave_the_network_as_it_was(phantom, none):
    few = tuple(array[:5] for array in phantom)
    found = completed(few, replace(QUICK, **{none: 0}), (0, 2, 4), jobs=1)
    assert accuracy(found.labels.labels, few[1], (0, 2, 4)) > 0.9
    if none != "local_steps":
        assert all(len(set(section.objective)) == 1 for section in found.sections.values())


# ---- FCN-8s ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_fcn_learns_and_completes_a_stack_of_three(phantom, monkeypatch):
    """Narrow where it was fully connected; the rest of VGG-16 as it is."""
    import limner.pixel_classifier as pixel_classifier

    losses, train, network = [], pixel_classifier.train, pixel_classifier.FCN8s
    monkeypatch.setattr(pixel_classifier, "train", lambda *a, **k: losses.extend(train(*a, **k)))

    class Narrow(network):
        def __init__(self, n_classes):
            super().__init__(n_classes, fc_width=64)

    monkeypatch.setattr(pixel_classifier, "FCN8s", Narrow)
    three = tuple(array[:3] for array in phantom)
    settings = replace(QUICK, network="fcn_vgg16", training_steps=30, local_steps=4, iterations=1, m_steps=2)
    found = completed(three, settings, (0, 2), jobs=1)
    assert np.mean(losses[-5:]) < 0.7 * np.mean(losses[:5])
    assert np.isfinite(found.uncertainty).all()
    assert accuracy(found.labels.labels, three[1], (0, 2)) > 0.9


def test_intervals_of_areas_are_as_wide_as_left_out_sections_err(phantom, monkeypatch):
    """Section 8 is left out: the widest of the errors of 3 and 7, each over its doubt and over the spread at 8."""
    widths = []

    def seen(likeliest, deviation, width, pixels):
        widths.append(width)
        return pixels_between(likeliest, deviation, width, pixels)

    monkeypatch.setattr(stack_completion, "pixels_between", seen)
    images, labels = phantom
    space, settings = Space(labels.shape, SPACING), replace(QUICK, method="fusion", rho=20.0)
    found = completed(phantom, settings, jobs=1)
    fusion = SectionFusion.of_stack(Volume(images, space), annotated(labels), FusionOptions(rho=20.0), "cpu")
    chances = torch.softmax(fusion.evidence(8, 8) / found.calibration["temperature"], dim=0).double().numpy()
    errors = []
    for index, structure in enumerate(fusion.structures(8, 8)):
        variance = chances[index] * (1 - chances[index])
        off = abs(np.sum(chances.argmax(axis=0) == index) - np.sum(labels[8] == structure))
        errors.append(off / np.sqrt(variance[variance > 1e-4]).sum())
    spread = (4 * SPACING[0] * 4 * SPACING[0] / (8 * SPACING[0])) ** 0.5
    assert found.calibration["area_width"] == pytest.approx(max(errors[1:]) / spread, rel=1e-3)
    spreads = [(a * b / (a + b) * SPACING[0]) ** 0.5 for a, b in [(1, 3), (2, 2), (3, 1)] * 3]
    np.testing.assert_allclose(widths, found.calibration["area_width"] * np.array(spreads))


def test_areas_that_cannot_be_calibrated_err_as_one(phantom, monkeypatch):
    widths = []

    def seen(likeliest, deviation, width, pixels):
        widths.append(width)
        return pixels_between(likeliest, deviation, width, pixels)

    monkeypatch.setattr(stack_completion, "pixels_between", seen)
    found = completed(phantom, replace(QUICK, method="fusion"), (0, 12), jobs=1)
    assert "area_width" not in found.calibration
    assert set(widths) == {1.645}


@pytest.mark.parametrize("label", [-3, 2**40])
def test_labels_that_would_not_survive_are_refused(phantom, label):
    labels = np.where(phantom[1] == 7, label, phantom[1].astype(np.int64))
    with pytest.raises(ValueError, match=r"complete\(\): labels range from .*; renumber them"):
        completed((phantom[0], labels), QUICK)


def test_an_empty_labelled_section_does_not_calibrate(phantom):
    """Section 4 would be held out, but there is nothing on it to be right or wrong about."""
    labels = phantom[1].copy()
    labels[4] = 0
    found = completed((phantom[0], labels), replace(QUICK, method="fusion"), (0, 4, 8))
    assert "temperature" not in found.calibration
    assert any("not calibrated" in note for note in found.notes)


def test_random_numbers_of_the_caller_go_on_as_if_nothing_had_been_drawn(phantom):
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    completed(phantom, QUICK)
    torch.testing.assert_close(torch.rand(3), expected)


@pytest.mark.parametrize("changes", [{"method": "network"}, {"fusion": "printed"}, {"rho": 21.0}])
def test_a_mirror_image_that_would_have_no_part_is_refused(changes):
    replace(Settings(), mirror=True).check()
    with pytest.raises(
        ValueError, match=r"^Settings\(\): mirror speaks in blended fusion with rho fitted, not in [^\n]*$"
    ):
        replace(Settings(), mirror=True, **changes).check()
