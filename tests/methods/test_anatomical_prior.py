"""Brains of three structures whose size differs from subject to subject; scans of a contrast no label map shows."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch

from limner.aligned_scan import place
from limner.augmentation import deform_volume
from limner.label_map_prior import BrainMap, Settings, build, fit, kl_weight, prior_loss, slices_of, together
from limner.label_merging import Merging
from limner.methods.anatomical_prior import (
    TASK,
    Inference,
    Slices,
    decoded,
    explain_loss,
    first_intensities,
    fit_encoder,
    from_model,
    in_brain,
    own_codes,
    refinement,
    segment,
    slices_of_scans,
    tempered,
    to_model,
)
from limner.metrics.pixels import dice
from limner.model_file import read_model
from limner.registration.template import Template
from limner.registration.volume_affine import Alignment
from limner.registration.volume_transform import AffineTransform
from limner.space import Space
from limner.volume import Volume

SPACE = Space((24, 20, 28), (2.0, 2.0, 2.0), (-23.0, -19.0, -27.0))
MERGING = Merging((("background", (0,)), ("shell", (3, 42)), ("core", (2,)), ("pit", (4,))))
GREY = np.array([0.0, 90.0, 50.0, 140.0])
SMALL = Settings(latent=8, width=8, levels=3, coarse=1, steps=120, batch=12, rate=3e-3, elastic=0.7)
EACH = torch.arange(4)
QUICK = Inference(warm_up=20, steps=60, batch=12, draws=2, bias_order=0)


def classes_of(size):
    """An ellipsoid with a core and, in it, a pit as large as `size` in voxels."""
    z, y, x = np.meshgrid(*(np.arange(n) - (n - 1) / 2 for n in SPACE.shape), indexing="ij")
    classes = np.zeros(SPACE.shape, np.uint8)
    classes[(z / 10) ** 2 + (y / 9) ** 2 + (x / 12) ** 2 < 1] = 1
    classes[(z / 8) ** 2 + (y / 8) ** 2 + (x / 9) ** 2 < 1] = 2
    classes[z**2 + y**2 + (x - 1) ** 2 < size**2] = 3
    return classes


def brain_map(size):
    return BrainMap(classes_of(size), np.ones(SPACE.shape, bool))


def scan_of(size, noise=8.0, shading=0.0, seed=0):
    classes = classes_of(size)
    gain = 1 + shading * np.linspace(-1, 1, SPACE.shape[2])
    pixels = gain * GREY[classes] + np.random.default_rng(seed).normal(0, noise, SPACE.shape)
    return np.where(classes > 0, np.maximum(pixels, 1), 0).astype(np.float32)


@pytest.fixture(scope="module")
def template():
    return Template((classes_of(4) > 0).astype(np.float32), SPACE)


@pytest.fixture(scope="module")
def prior(template):
    return fit([brain_map(size) for size in (2, 3, 4, 5, 6)], template, MERGING, SMALL)[0]


def placed(size, template, **more):
    return place(Volume(scan_of(size, **more), SPACE), Alignment(AffineTransform(), 1.0, 1.0), template)


@pytest.fixture(scope="module")
def explained(prior, template):
    scans = [placed(size, template, seed=i) for i, size in enumerate((2.5, 3.5, 5.5))]
    return scans, *fit_encoder(scans, prior, QUICK)


@pytest.mark.parametrize("slices", ["z", "y", "x", "none"])
def test_slices_are_put_together_again(slices):
    maps = torch.randn(3, 4, 5, 6)
    settings = Settings(slices=slices)
    cut = slices_of(maps, settings)
    assert len(cut) == {"z": 4, "y": 5, "x": 6, "none": 1}[slices]
    assert torch.equal(together(cut, settings), maps)


def test_the_slices_are_those_of_the_axis():
    maps = torch.arange(2 * 3 * 4.0).view(1, 2, 3, 4)
    assert torch.equal(slices_of(maps, Settings(slices="y"))[2, 0], maps[0, :, 2])


def test_the_kl_term_counts_late_and_in_full_at_the_end():
    settings = Settings(steps=100, kl_from=0.4)
    assert [kl_weight(step, settings) for step in (0, 40, 55, 70, 99)] == pytest.approx([0, 0, 0.5, 1, 1])


def test_the_loss_of_a_prior_without_a_code_is_that_of_the_location_prior():
    network = build(3, (8, 8, 8), replace(SMALL, latent=2, slices="z"))
    location = torch.tensor([0.5, 0.3, 0.2]).view(1, 3, 1, 1).expand(1, 3, 8, 8)
    classes = torch.ones(1, 8, 8, dtype=torch.long)
    loss = prior_loss(network, classes, torch.ones(1, 8, 8), location.log(), 0.0, torch.Generator())
    assert loss.item() == pytest.approx(-64 * math.log(0.3), rel=1e-4)


def test_a_scan_is_explained_by_hand():
    slices = Slices(
        images=torch.tensor([[[[1.0, 0.0]]]]),
        inside=torch.tensor([[[1.0, 0.0]]]),
        outside=torch.tensor([[[0.0, 1.0]]]),
        place=torch.zeros(1, dtype=torch.long),
    )
    log_f = torch.tensor([0.25, 0.75]).log().view(1, 2, 1, 1).expand(1, 2, 1, 2)
    means, sigmas = torch.tensor([0.0, 1.0]), torch.tensor([0.5, 2.0])
    normal = [math.exp(-0.5 * 4) / 0.5, 1 / 2.0]
    pixel = -math.log((0.25 * normal[0] + 0.75 * normal[1]) / math.sqrt(2 * math.pi))
    code = torch.tensor([[3.0]]), torch.tensor([[0.0]])
    exact = float(explain_loss(log_f, code, slices, means, sigmas))
    assert exact == pytest.approx(pixel - math.log(0.25) + 4.5, rel=1e-5)
    assert float(explain_loss(log_f, code, slices, means, sigmas, bound=True)) > exact


def test_first_intensities_are_the_means_of_labels_that_place_decides():
    inside = torch.tensor([[[1.0, 1.0, 1.0, 0.0]]])
    slices = Slices(torch.tensor([[[[2.0, 4.0, 9.0, 50.0]]]]), inside, 1 - inside, torch.zeros(1, dtype=torch.long))
    sure = torch.tensor([[0.0, 1.0, 1.0, 0.0, 0.0], [0.0, 0.0, 0.0, 1.0, 1.0]])[:, 1:]
    log_location = sure.clamp_min(1e-9).log().view(1, 2, 1, 4)
    means, deviations = first_intensities(slices, log_location, torch.arange(2))
    assert means.tolist() == pytest.approx([3, 9], rel=1e-3)
    assert deviations.tolist() == pytest.approx([1, 0], abs=1e-2)
    means, deviations = first_intensities(slices, log_location, torch.zeros(2, dtype=torch.long))
    assert means.tolist() == pytest.approx([5], rel=1e-3)
    assert deviations.tolist() == pytest.approx([math.sqrt(26 / 3)], rel=1e-3)


def test_the_prior_learns_what_differs_between_subjects(prior):
    """Label maps it has not seen are reconstructed better than the location prior holds them."""
    log_location = prior.log_location
    likelihoods = []
    for size in (2.5, 4.5, 5.5):
        classes = slices_of(torch.from_numpy(classes_of(size)).long(), SMALL)
        with torch.no_grad():
            log_f = prior.network.decoder(prior.network.encode(classes)[0], log_location)
        likelihoods.append([m.gather(1, classes[:, None]).sum().item() for m in (log_f, log_location)])
    ours, location = np.mean(likelihoods, axis=0)
    assert ours > 0.9 * location  # both below 0


def test_the_decoder_beats_the_location_prior_and_refining_beats_both(prior, explained):
    scans, model, losses = explained
    scores = []
    for scan, size in zip(scans, (2.5, 3.5, 5.5), strict=True):
        truth = classes_of(size)[scan.brain]
        location = in_brain(prior.location, prior, scan)
        own = in_brain(next(decoded(prior, own_codes(scan, prior, model, QUICK), 0, 0)), prior, scan)
        steps = (location, own, refinement(own, scan, QUICK, EACH)[0](own))
        scores.append([np.mean([dice(p.argmax(dim=0).numpy(), truth, n) for n in (1, 2, 3)]) for p in steps])
    location, own, ours = np.mean(scores, axis=0)
    assert losses[-1] < losses[0]
    assert own > location + 0.03
    assert ours > own and ours > 0.9


def test_a_segmentation_tells_what_is_uncertain(prior, explained):
    scans, model, _ = explained
    found = segment(scans[0], prior, model, replace(QUICK, samples=2))
    n = int(scans[0].brain.sum())
    assert found.classes.shape == found.uncertainty.shape == (n,)
    assert found.samples.shape == (2, n)
    assert (found.uncertainty >= 0).all() and (found.uncertainty <= 1).all()
    wrong = found.classes != classes_of(2.5)[scans[0].brain]
    assert found.uncertainty[wrong].mean() > 3 * found.uncertainty[~wrong].mean()
    assert found.volumes.tolist() == [(found.classes == i).sum() for i in range(4)]
    assert len(found.bound) > 1 and (np.diff(found.bound) >= -1e-6 * abs(found.bound[0])).all()
    assert (found.intervals[0] <= found.volumes).all() and (found.volumes <= found.intervals[1]).all()


def test_own_codes_explain_a_scan_better_than_the_encoder_s(prior, explained):
    """Exactly as `explain_loss` says, and in parts of the scan as in one piece."""
    scans, model, _ = explained
    scan = scans[2]
    slices = slices_of_scans([scan], prior)
    seen = [int(place) for place in slices.place]

    def loss(codes):
        mean, log_variance = codes[0][seen], codes[1][seen]
        with torch.no_grad():
            log_f = prior.network.decoder(mean, prior.log_location[seen])
            return float(explain_loss(log_f, (mean, log_variance), slices, model.means, model.sigmas))

    losses = [loss(own_codes(scan, prior, model, replace(QUICK, own_steps=n))) for n in (0, 4, 12)]
    assert losses[0] > losses[1] > losses[2]
    found = own_codes(scan, prior, model, replace(QUICK, own_steps=0))
    with torch.no_grad():
        read = model.encoder(slices.images)
    torch.testing.assert_close((found[0][seen], found[1][seen]), read)
    whole = own_codes(scan, prior, model, replace(QUICK, batch=1000))
    torch.testing.assert_close(own_codes(scan, prior, model, replace(QUICK, batch=5))[0], whole[0], atol=2e-3, rtol=0)


def test_no_draws_give_no_samples_and_the_same_labels(prior, explained):
    scans, model, _ = explained
    with_draws, without = (segment(scans[1], prior, model, replace(QUICK, draws=n)) for n in (2, 0))
    assert (with_draws.classes == without.classes).all()
    assert without.samples.shape[0] == 0


def test_shading_is_fitted(prior, template):
    scan = placed(5, template, shading=0.6, noise=6)
    truth = classes_of(5)[scan.brain]
    location = in_brain(prior.location, prior, scan)
    flat, bent = (
        refinement(location, scan, replace(QUICK, bias_order=n), EACH)[0](location).argmax(dim=0).numpy()
        for n in (0, 2)
    )
    assert np.mean(bent == truth) > np.mean(flat == truth) + 0.02


def test_labels_of_one_tissue_share_its_posterior_as_the_prior_says(prior, template):
    scan = placed(5, template)
    location = in_brain(prior.location, prior, scan)
    tissues = torch.tensor([0, 1, 0, 2])
    found = refinement(location, scan, QUICK, tissues)[0](location)
    torch.testing.assert_close(found.sum(dim=0), torch.ones(found.shape[1]))
    torch.testing.assert_close(found[0] * location[2], found[2] * location[0])
    apart = refinement(location, scan, QUICK, EACH)[0](location)
    assert (apart[0] * location[2] - apart[2] * location[0]).abs().max() > 0.01


def test_a_tissue_keeps_a_structure_from_taking_its_neighbour(template):
    """The prior gives some of the core to the shell, of which no voxel is there: it takes on the core's grey level."""
    classes = classes_of(5)
    classes[classes == 1] = 2
    pixels = np.array([0.0, 0.0, 90.0, 20.0])[classes] + np.random.default_rng(0).normal(0, 8, SPACE.shape)
    volume = Volume(np.where(classes > 0, np.maximum(pixels, 1), 0).astype(np.float32), SPACE)
    scan = place(volume, Alignment(AffineTransform(), 1.0, 1.0), template)
    truth = torch.from_numpy(classes[scan.brain]).long()
    f = torch.full((4, len(truth)), 0.02)
    f[truth, torch.arange(len(truth))] = 0.94
    rim = (truth == 2) & (torch.rand(len(truth), generator=torch.Generator().manual_seed(0)) < 0.1)
    f[:, rim] = torch.tensor([0.01, 0.7, 0.28, 0.01])[:, None]
    apart, shared = (refinement(f, scan, QUICK, torch.tensor(t))[0](f).argmax(dim=0) for t in (range(4), (0, 1, 2, 1)))
    assert (apart[rim] == 1).float().mean() > 0.9
    assert (shared[rim] == 2).float().mean() > 0.9


def test_a_segmentation_is_tempered_and_knows_tissues(prior, explained):
    scans, model, _ = explained
    scan, quick = scans[2], replace(QUICK, draws=0, own_steps=0)
    shared = replace(model, tissues=torch.tensor([0, 1, 0, 2]))
    own = in_brain(next(decoded(prior, own_codes(scan, prior, model, quick), 0, 0)), prior, scan)
    location = in_brain(prior.location, prior, scan)
    bounds = []
    for of_scans, share in ((model, 0.0), (model, 0.9), (shared, 0.0)):
        mixed = tempered(own, location, share)
        refine, bound = refinement(mixed, scan, quick, of_scans.tissues)
        found = segment(scan, prior, of_scans, replace(quick, location_share=share))
        assert (found.classes == refine(mixed).argmax(dim=0).numpy()).all()
        assert found.bound == pytest.approx(bound)
        bounds.append(bound[-1])
    assert len({round(bound) for bound in bounds}) == 3


def test_an_encoder_gives_labels_of_one_tissue_one_intensity(prior, template):
    scans = [placed(size, template) for size in (2.5, 5.5)]
    model, _ = fit_encoder(scans, prior, replace(QUICK, steps=4), tissues=[0, 1, 0, 2])
    assert model.tissues.tolist() == [0, 1, 0, 2]
    assert model.means[0] == model.means[2] and model.sigmas[0] == model.sigmas[2]
    assert len({*model.means.tolist()}) == 3


def test_tempering_goes_from_the_decoder_to_the_location_prior():
    f, location = torch.tensor([[0.9], [0.1]]), torch.tensor([[0.2], [0.8]])
    torch.testing.assert_close(tempered(f, location, 0.0), f)
    torch.testing.assert_close(tempered(f, location, 1.0), location)
    a, b = math.sqrt(0.9 * 0.2), math.sqrt(0.1 * 0.8)
    torch.testing.assert_close(tempered(f, location, 0.5)[:, 0], torch.tensor([a, b]) / (a + b))


def test_a_model_file_gives_the_same_segmentation(prior, explained, tmp_path):
    scans, model, _ = explained
    to_model(prior, {"steps": 1}, model).write(tmp_path / "m.safetensors")
    again, of_scans = from_model(read_model(tmp_path / "m.safetensors", TASK))
    assert again.merging == MERGING and again.settings == SMALL and again.template.space == SPACE
    one, other = segment(scans[2], prior, model, QUICK), segment(scans[2], again, of_scans, QUICK)
    assert np.mean(one.classes != other.classes) < 1e-3  # the location prior is kept in half precision
    assert other.uncertainty == pytest.approx(one.uncertainty, abs=1e-2)
    assert of_scans.tissues.tolist() == [0, 1, 2, 3]
    file = to_model(prior, {}, replace(model, tissues=torch.tensor([0, 1, 0, 2])))
    assert from_model(file)[1].tissues.tolist() == [0, 1, 0, 2]
    del file.weights["tissues"]  # as files of before have it
    assert from_model(file)[1].tissues.tolist() == [0, 1, 2, 3]
    to_model(prior, {}).write(tmp_path / "prior.safetensors")
    assert from_model(read_model(tmp_path / "prior.safetensors", TASK))[1] is None


def test_the_paper_s_decoder_and_whole_volumes_can_be_chosen(template):
    settings = replace(SMALL, slices="none", bends=False, coarse=0, steps=2, batch=24)
    whole, losses = fit([brain_map(3), brain_map(4)], template, MERGING, settings)
    scan = placed(4, template)
    model, _ = fit_encoder([scan], whole, replace(QUICK, warm_up=1, steps=1, batch=1))
    assert len(losses) == 2
    assert segment(scan, whole, model, QUICK).classes.shape == (int(scan.brain.sum()),)


def test_a_training_that_goes_on_ends_as_one_without_a_stop(template, tmp_path):
    from limner.checkpoint import Checkpoint

    maps, settings = [brain_map(3), brain_map(4)], replace(SMALL, steps=6)
    checkpoint = Checkpoint(tmp_path / "state", key="a", seconds=0)

    def stop(step, _):
        if step == 3:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        fit(maps, template, MERGING, settings, progress=stop, checkpoint=checkpoint)
    resumed, losses = fit(maps, template, MERGING, settings, checkpoint=checkpoint)
    at_once, expected = fit(maps, template, MERGING, settings)
    assert losses == pytest.approx(expected)
    pairs = zip(resumed.network.parameters(), at_once.network.parameters(), strict=True)
    assert all(torch.allclose(a, b) for a, b in pairs)


def test_what_lay_outside_a_label_map_teaches_nothing(template):
    known = np.ones(SPACE.shape, bool)
    known[:12] = False
    other = classes_of(4)
    other[:12] = 3  # nonsense where nothing is known
    settings = replace(SMALL, steps=3, elastic=0.0, stretch=0.0)
    one, two = (
        fit([BrainMap(classes, known), BrainMap(classes, known)], template, MERGING, settings)[1]
        for classes in (classes_of(4), other)
    )
    assert one == pytest.approx(two)


def test_deformed_labels_are_labels_and_move_with_their_weights():
    labels = torch.from_numpy(classes_of(5).astype(np.float32))
    moved = deform_volume(torch.stack([labels, labels]), 2.0, 0.05, torch.Generator().manual_seed(0))
    assert set(moved.unique().tolist()) <= {0, 1, 2, 3}
    assert torch.equal(moved[0], moved[1])
    assert 0.02 < (moved[0] != labels).float().mean() < 0.5


def test_settings_that_cannot_be_are_refused():
    with pytest.raises(ValueError, match="--coarse: 3 leaves nothing of 3 levels"):
        Settings(levels=3, coarse=3).check()
    with pytest.raises(ValueError, match="--rate"):
        Inference(rate=0).check()
    Settings().check()
    Inference(warm_up=0, draws=0).check()
