from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from torch import nn

from limner.checkpoint import Checkpoint
from limner.inference import Options
from limner.methods.membranes import (
    DEPTHS,
    SIGMAS,
    TASK,
    UNKNOWN,
    Averaging,
    Fusion,
    Segmentation,
    Settings,
    TracedSection,
    _batch,
    _prepared,
    auxiliary_weight,
    build,
    choose_fusion,
    contextual_loss,
    fit,
    from_model,
    fused_map,
    known_noise,
    levelled,
    membrane_map,
    rate_at,
    segment,
    settle,
    to_model,
    train,
)
from limner.metrics.neurites import thin, v_rand
from limner.model_file import read_model
from limner.networks.contextual import ContextualNetwork
from limner.networks.tiled_unet import TiledUNet
from limner.run_record import Store
from limner.section_grey import grey_statistics
from limner.watershed import cells_between, fuse

QUICK = Settings(width=4, steps=60, patch=64, rate=2e-2)
TINY = Settings(width=2, steps=6, patch=32, batch=2)


def neurites(seed, shape=(160, 160), n=20):
    """Cells around random centres; thin dark membranes that fade in places, dark bodies within cells, uneven light."""
    draw = np.random.default_rng(seed)
    y, x = np.indices(shape)
    centres = draw.uniform(0, shape, (n, 2))
    nearest, second = np.sort([np.hypot(y - a, x - b) for a, b in centres], axis=0)[:2]
    membrane = second - nearest < 3
    fading = ndimage.gaussian_filter(draw.normal(size=shape), 6)
    levels = np.where(membrane, np.where(fading > 1.2 * fading.std(), 150, 90), 170)
    for a, b in centres + draw.normal(0, 3, (n, 2)):
        levels[np.hypot(y - a, x - b) < 4] = 90
    light = 60 * draw.choice([-1, 1]) * (x - shape[1] / 2) / (shape[1] / 2)
    image = np.clip(levels + light + draw.normal(0, 30, shape), 0, 255).astype(np.uint8)
    return TracedSection(image, membrane)


def agreement(probability, section):
    """V_rand at the threshold 0.5."""
    return v_rand(thin(probability < 0.5), cells_between(section.membrane)).score


@pytest.fixture(scope="module")
def sections():
    return [neurites(0), neurites(1)]


@pytest.fixture(scope="module")
def trained(sections):
    model, losses = fit(sections, QUICK, um_per_px=0.004)
    assert len(losses) == QUICK.steps
    return model


@pytest.fixture(scope="module")
def unseen():
    return neurites(9)


# ---- the loss and its schedule ------------------------------------------------------------------------------------


def test_loss_by_hand():
    """Two branches, a pixel of membrane and one of cell; membrane has e^3 the weight of cell for it, then 1 / e."""
    first = torch.tensor([[0.0, 1.0], [2.0, 0.0]]).view(1, 2, 1, 2)
    second = torch.tensor([[0.0, 0.0], [1.0, 0.0]]).view(1, 2, 1, 2)
    targets = torch.tensor([[[1, 0]]])

    def softplus(x):
        return np.log1p(np.exp(x))

    whole = (softplus(-3) + softplus(-1)) / 2
    branches = (softplus(-2) + softplus(-1)) / 2 + (softplus(-1) + softplus(0)) / 2
    assert contextual_loss([first, second], targets, 0.0).item() == pytest.approx(whole, rel=1e-6)
    assert contextual_loss([first, second], targets, 0.4).item() == pytest.approx(whole + 0.4 * branches, rel=1e-6)


def test_unknown_pixels_give_no_loss_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    scores = [torch.randn(2, 2, 6, 7, generator=generator).requires_grad_() for _ in range(3)]
    targets = torch.randint(2, (2, 6, 7), generator=generator)
    targets[:, :3] = UNKNOWN
    loss = contextual_loss(scores, targets, 0.5)
    loss.backward()
    assert not any(score.grad[:, :, :3].any() for score in scores)
    assert min(score.grad[:, :, 3:].abs().amax(dim=1).min() for score in scores) > 0
    known = contextual_loss([score[:, :, 3:] for score in scores], targets[:, 3:], 0.5)
    assert loss.item() == pytest.approx(known.item(), rel=1e-6)
    assert contextual_loss(scores, torch.full_like(targets, UNKNOWN), 0.5).item() == 0


def test_auxiliary_weights_fall_to_nothing():
    weights = [auxiliary_weight(step, Settings(steps=1000, auxiliary=0.8)) for step in (0, 250, 500, 999)]
    np.testing.assert_allclose(weights, [0.8, 0.6, 0.4, 0.0008])
    assert auxiliary_weight(0, Settings(steps=1000, auxiliary=0)) == 0


def test_rate_of_the_paper_and_of_a_short_training():
    paper = Settings(optimiser="sgd", rate=0.01, decay_steps=2000, steps=10_000)
    rates = [rate_at(step, paper) for step in (0, 1999, 2000, 4000, 9999)]
    np.testing.assert_allclose(rates, [1e-2, 1e-2, 1e-3, 1e-4, 1e-6])
    rates = [rate_at(step, Settings(steps=1000, rate=0.3)) for step in (0, 14, 500, 750, 1000)]
    np.testing.assert_allclose(rates, [0.01, 0.15, 0.15, 0.3 * (1 - 2**-0.5) / 2, 0], rtol=1e-3)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch": 0}, "--batch: 0 is not possible; give a number above 0"),
        ({"rate": float("nan")}, "--rate: nan is not possible; give a number above 0"),
        ({"weight_decay": -1.0}, "--weight-decay: -1.0 is not possible; give 0 or more"),
        ({"seed": -1}, "--seed: -1 is not possible; give 0 or more"),
        ({"patch": 100}, "--patch: 100 is no multiple of 16 up to 4096; give 128, 256, 480, ..."),
        ({"dropout": 1.0}, "--dropout: 1.0 is no share; give 0 or more, below 1"),
        ({"contrast": 1.5}, "--contrast: 1.5 is no share; give 0 or more, below 1"),
        ({"network": "vgg"}, "--network: vgg is not known; give contextual or unet"),
        ({"optimiser": "lbfgs"}, "--optimiser: lbfgs is not known; give adam or sgd"),
    ],
)
def test_settings_that_cannot_be(change, message):
    Settings().check()
    with pytest.raises(ValueError) as told:
        replace(Settings(), **change).check()
    assert str(told.value) == message


# ---- sections and patches -----------------------------------------------------------------------------------------


def test_a_traced_section_is_grey_with_a_mask_of_its_size():
    with pytest.raises(ValueError, match=r"^TracedSection\(\): an image of shape \(4, 5\) and membranes of shape \(4,"):
        TracedSection(np.zeros((4, 5)), np.zeros((4, 6), bool))
    with pytest.raises(ValueError, match=r"shape \(4, 5, 3\) .* give both in grey"):
        TracedSection(np.zeros((4, 5, 3)), np.zeros((4, 5, 3), bool))
    with pytest.raises(ValueError, match=r"^TracedSection\(\): membranes of type uint8 found; give true on membrane"):
        TracedSection(np.zeros((4, 5)), np.zeros((4, 5), np.uint8))


def test_patches_show_membrane_where_the_image_does():
    """Turned, mirrored and bent alike; the image here is dark on membrane."""
    settings = Settings(patch=64, batch=8, contrast=0.0, noise=0.0)
    membrane = neurites(0).membrane
    image = np.where(membrane, 20.0, 200.0)
    images, targets = _batch(
        [_prepared(TracedSection(image, membrane), 64)], settings, torch.Generator().manual_seed(0)
    )
    assert (images.shape, targets.shape) == ((8, 1, 64, 64), (8, 64, 64))
    assert set(targets.unique().tolist()) == {0, 1}
    middle = (_prepared(TracedSection(image, membrane), 64)[0].aminmax().max + images.min()) / 2
    assert ((images[:, 0] < middle) == (targets == 1)).float().mean() > 0.99
    assert len({tuple(patch.flatten().tolist()) for patch in targets}) == 8


def test_without_bending_and_contrast_patches_are_turned_parts_of_the_section():
    settings = Settings(patch=32, batch=60, contrast=0.0, elastic_px=0.0, noise=0.0)
    image = np.arange(40.0 * 44).reshape(40, 44)
    prepared = _prepared(TracedSection(image, image > 900), 32)
    images, targets = _batch([prepared], settings, torch.Generator().manual_seed(0))
    turns = set()
    for patch, classes in zip(images[:, 0].numpy(), targets.numpy(), strict=True):
        values = np.rint(patch * image.std() + image.mean()).astype(int)
        np.testing.assert_array_equal(classes, values > 900)
        turns.add((values[0, 1] - values[0, 0], values[1, 0] - values[0, 0]))
    assert turns == {(a, b) for s in (1, -1) for t in (44, -44) for a, b in ((s, t), (t, s))}


def test_a_section_smaller_than_a_patch_is_continued_by_what_is_unknown():
    section = TracedSection(np.random.default_rng(0).normal(size=(20, 50)), np.eye(20, 50, dtype=bool))
    prepared = _prepared(section, 32)
    assert prepared.shape == (3, 32, 50)
    assert prepared[2].sum() == 20 * 50
    torch.testing.assert_close(prepared[0, 20], prepared[0, 19])
    _, targets = _batch([prepared], TINY, torch.Generator().manual_seed(0))
    assert 0.2 < (targets == UNKNOWN).float().mean() < 0.6


def test_contrast_and_brightness_change_with_every_patch_within_their_range():
    grain = 1e-9 * np.random.default_rng(0).normal(size=(64, 64))  # no level is that of a margin
    section = TracedSection(np.where(np.arange(64) % 2, 0.0, 2.0) + grain, np.zeros((64, 64), bool))
    settings = Settings(patch=32, batch=64, contrast=0.3, elastic_px=0.0, noise=0.0)
    images, _ = _batch([_prepared(section, 32)], settings, torch.Generator().manual_seed(0))
    highest, lowest = images.amax(dim=(1, 2, 3)), images.amin(dim=(1, 2, 3))
    gain, shift = (highest - lowest) / 2, (highest + lowest) / 2
    for values, middle in ((gain, 1.0), (shift, 0.0)):
        assert middle - 0.3 <= values.min() < middle - 0.25
        assert middle + 0.25 < values.max() <= middle + 0.3
    assert abs(np.corrcoef(gain, shift)[0, 1]) < 0.3


def test_noise_differs_from_patch_to_patch_up_to_its_deviation():
    flat = TracedSection(np.zeros((64, 64)), np.zeros((64, 64), bool))
    settings = Settings(patch=64, batch=60, contrast=0.0, elastic_px=0.0, noise=0.4)
    images, _ = _batch([_prepared(flat, 64)], settings, torch.Generator().manual_seed(0))
    deviations = images.std(dim=(1, 2, 3))
    assert deviations.min() < 0.05
    assert 0.35 < deviations.max() < 0.42
    assert abs(float(deviations.mean()) - 0.2) < 0.05


def test_the_auxiliary_terms_reach_their_own_branch():
    """The gradient of a mean cross-entropy is (softmax - one hot) / n: of the sum, and w_c times that of the branch."""
    draw = torch.Generator().manual_seed(0)
    scores = [torch.randn(1, 2, 3, 4, generator=draw, requires_grad=True) for _ in range(3)]
    targets = torch.randint(2, (1, 3, 4), generator=draw)
    one_hot = nn.functional.one_hot(targets, 2).movedim(-1, 1)
    contextual_loss(scores, targets, 0.5).backward()
    of_sum = torch.softmax(torch.stack(scores).sum(dim=0), dim=1) - one_hot
    for branch in scores:
        expected = (of_sum + 0.5 * (torch.softmax(branch, dim=1) - one_hot)) / 12
        torch.testing.assert_close(branch.grad, expected.detach())


# ---- training -----------------------------------------------------------------------------------------------------


def test_networks_of_one_cost_drawn_by_the_seed():
    state = torch.get_rng_state()
    first, again, other = (build(replace(TINY, seed=seed)) for seed in (0, 0, 1))
    weights = [torch.cat([p.flatten() for p in network.parameters()]) for network in (first, again, other)]
    assert torch.equal(weights[0], weights[1])
    assert not torch.equal(weights[0], weights[2])
    assert torch.equal(torch.get_rng_state(), state)
    assert isinstance(first, ContextualNetwork)
    assert isinstance(build(replace(TINY, network="unet")), TiledUNet)
    assert build(Settings(dropout=0.4)).dropout.p == 0.4


def test_membranes_of_an_unseen_section_are_found_better_than_by_any_threshold(trained, unseen):
    """The best threshold of the smoothed image, chosen on the unseen section itself, against 0.5 of the network."""
    truth = cells_between(unseen.membrane)
    smooth = [ndimage.gaussian_filter(unseen.image.astype(float), sigma) for sigma in (0, 1, 2, 3)]
    baseline = max(v_rand(thin(grey > level), truth).score for grey in smooth for level in range(80, 170, 10))
    found = membrane_map(trained.network, unseen.image)
    assert agreement(fused_map(found, trained.fusion), unseen) > max(0.85, baseline + 0.25)
    assert agreement(fused_map(found, trained.fusion), unseen) > agreement(found, unseen) + 0.05
    on_membrane, in_cells = found[unseen.membrane], found[~unseen.membrane]
    assert on_membrane.mean() > in_cells.mean() + 0.3


class Stopped(Exception):
    pass


@pytest.mark.parametrize("change", [{}, {"optimiser": "sgd", "decay_steps": 4}, {"network": "unet"}])
def test_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, sections, change):
    settings = replace(TINY, dropout=0.5, **change)

    def ended(progress=lambda *_: None, checkpoint=None):
        network = build(settings)
        return network, train(network, sections, settings, progress=progress, checkpoint=checkpoint)

    def stop(step, _):
        if step == 4:
            raise Stopped

    torch.manual_seed(1)
    whole, losses = ended()
    checkpoint = Checkpoint(tmp_path / "state", "key", seconds=0)
    torch.manual_seed(2)
    with pytest.raises(Stopped):
        ended(stop, checkpoint)
    torch.manual_seed(3)  # as in another process
    seen = []
    resumed, resumed_losses = ended(lambda step, _: seen.append(step), checkpoint)
    assert seen == [5, 6]
    assert resumed_losses == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_the_seed_decides_and_torchs_own_generator_stays(sections):
    torch.manual_seed(7)
    state = torch.get_rng_state()
    settings = replace(TINY, steps=2)
    losses = [train(build(settings), sections, replace(settings, seed=seed)) for seed in (0, 0, 1)]
    assert losses[0] == losses[1] != losses[2]
    assert torch.equal(torch.get_rng_state(), state)


def test_auxiliary_classifiers_learn_and_may_be_left_out(sections):
    """Without them the deepest branch gets less of a gradient: the first losses differ by the branches' own."""
    settings = replace(TINY, steps=1)
    with_them, without = (train(build(settings), sections, replace(settings, auxiliary=w))[0] for w in (1.0, 0.0))
    assert with_them > without + 1


def test_the_papers_optimiser_has_momentum_and_decay(sections, monkeypatch):
    made, rates = [], []

    class Watching(torch.optim.SGD):
        def __init__(self, *given, **more):
            made.append(more)
            super().__init__(*given, **more)

        def step(self, *given):
            rates.append(self.param_groups[0]["lr"])
            return super().step(*given)

    monkeypatch.setattr(torch.optim, "SGD", Watching)
    train(build(TINY), sections, replace(TINY, optimiser="sgd", rate=0.01, decay_steps=3, weight_decay=0.002))
    assert made == [{"momentum": 0.9, "weight_decay": 0.002}]
    np.testing.assert_allclose(rates, [0.01] * 3 + [0.001] * 3)


def test_a_loss_that_runs_away_ends_the_training_at_once(sections):
    class Broken(nn.Conv2d):
        def forward(self, image):
            return super().forward(image) * torch.nan

    told = []
    with pytest.raises(ValueError, match=r"^train\(\): the loss is nan at step 1; give a lower rate"):
        train(Broken(1, 2, 1), sections, TINY, progress=lambda *said: told.append(said))
    assert not told


def test_what_cannot_be_trained_on_is_refused(sections):
    blank = TracedSection(np.zeros((40, 40)), np.zeros((40, 40), bool))
    with pytest.raises(ValueError, match=r"^fit\(\): no section is given"):
        fit([], TINY)
    for membrane in (blank.membrane, ~blank.membrane):
        with pytest.raises(ValueError, match=r"^fit\(\): the labels hold membrane alone, or none; give both"):
            fit([replace(blank, membrane=membrane)], TINY)
    with pytest.raises(ValueError, match=r"^--patch: 40 is no multiple"):
        fit(sections, replace(TINY, patch=40))
    with pytest.raises(ValueError, match=r"^train\(\): 0 steps found"):
        train(build(TINY), sections, replace(TINY, steps=0))


def test_the_number_of_steps_follows_the_device(sections):
    assert settle(sections, Settings()).steps == 1500
    assert settle(sections, Settings(), "cuda").steps == 10_000
    assert settle(sections, Settings(steps=3), "cuda").steps == 3


# ---- from an image to membranes -----------------------------------------------------------------------------------


def test_a_margin_counts_for_nothing(trained, unseen):
    image = np.maximum(unseen.image, 1)  # 0 is the margin's
    height, width = image.shape
    moved = np.zeros((height + 64, width + 96), np.uint8)
    moved[32:-32, 48:-48] = image
    np.testing.assert_allclose(grey_statistics(moved), grey_statistics(image), rtol=1e-6)
    assert grey_statistics(np.full((40, 40), 7))[0] == 7
    inside = membrane_map(trained.network, moved)[32:-32, 48:-48]
    middle = (slice(50, -50), slice(50, -50))
    np.testing.assert_allclose(inside[middle], membrane_map(trained.network, image)[middle], atol=0.01)


def test_a_noisier_section_is_smoothed_to_the_noise_of_those_trained_on(tmp_path, trained, unseen):
    noisy = unseen.image + np.random.default_rng(0).normal(0, 60, unseen.image.shape)
    quieter = trained.seen(noisy)
    assert quieter.smoothing.sigma > 0.5
    expected = membrane_map(trained.network, quieter[0 : noisy.shape[0], 0 : noisy.shape[1]])
    small = Options(window=128)
    for matched, wanted in ((True, expected), (False, membrane_map(trained.network, noisy))):
        store = Store(tmp_path / str(matched))
        found = segment([noisy, unseen.image], trained, store, ["a", "b"], options=small, match_noise=matched)
        np.testing.assert_allclose(found.maps[0], wanted, atol=1e-4)
        assert found.smoothed == ((quieter.smoothing.sigma if matched else 0.0), 0.0)


def test_what_lies_on_a_margin_is_no_cell(trained):
    fused = np.zeros((40, 60), np.float32)
    fused[:, 20] = fused[:, 40] = 1
    pixels = np.random.default_rng(0).integers(1, 255, fused.shape)
    found = Segmentation((), trained.fusion)
    assert found.cells(fused, pixels).max() == 3
    pixels[:, :20] = 0
    cells = found.cells(fused, pixels)
    assert cells[:, :20].max() == 0
    assert (cells[5, 30], cells[5, 50]) == (1, 2)
    assert found.cells(fused, np.zeros((40, 60), int)).max() == 0


def test_contrast_of_a_section_does_not_matter(trained, unseen):
    expected = membrane_map(trained.network, unseen.image)
    for other in (unseen.image * np.float32(0.3) + 17, unseen.image.astype(np.uint16) * 200 + 9000):
        np.testing.assert_allclose(membrane_map(trained.network, other), expected, atol=1e-4)
    assert np.abs(membrane_map(trained.network, 255 - unseen.image) - expected).max() > 0.1


def test_windows_do_not_change_the_map(trained, unseen):
    image = unseen.image[:150, :157]
    expected = membrane_map(trained.network, image)
    assert (expected.shape, expected.dtype) == (image.shape, np.float32)
    options = Options(window=136, device="cpu")
    assert len(options.grid(Averaging().of(trained.network), image.shape)) == 4
    np.testing.assert_allclose(membrane_map(trained.network, image, None, options), expected, atol=1e-5)


def test_a_map_is_the_mean_over_symmetries_and_shifted_crops(trained, unseen):
    image = unseen.image[:64, :72]
    expected = membrane_map(trained.network, image)
    mirrored = membrane_map(trained.network, np.ascontiguousarray(image[:, ::-1]))[:, ::-1]
    np.testing.assert_allclose(mirrored, expected, atol=1e-5)
    assert np.abs(membrane_map(trained.network, image, Averaging(symmetries=False)) - expected).max() > 0.01
    assert [Averaging(crops=n).of(trained.network).shifts for n in (1, 2, 4)] == [(0,), (0, 4), (0, 2, 4, 6)]
    assert np.abs(membrane_map(trained.network, image, Averaging(crops=2)) - expected).max() > 0.001


def test_a_stack_is_segmented_section_by_section(trained, unseen, tmp_path):
    images = [unseen.image, unseen.image[:70, :90]]
    found = segment(images, trained, Store(tmp_path), ["a", "b"], least_cell=30)
    assert len(found) == 2
    for z, image in enumerate(images):
        fused = fused_map(membrane_map(trained.network, image), trained.fusion)
        np.testing.assert_allclose(found.fused(z), fused, atol=1e-6)
        cells = found.cells(found.fused(z), image)
        np.testing.assert_array_equal(cells, cells_between(found.fused(z) >= 0.5, least=30))
        assert cells.max() > 3
        assert np.bincount(cells.ravel())[1:].min() >= 30


# ---- fusion -------------------------------------------------------------------------------------------------------


def walls(gap=0.9, shape=(60, 80)):
    """Two walls that make three cells, and the map of them with a gap in the first."""
    membrane = np.zeros(shape, bool)
    membrane[:, 20:23] = membrane[:, 50:53] = True
    probability = np.where(membrane, 0.9, 0.02).astype(np.float32)
    probability[20:26, 20:23] = gap
    return probability, TracedSection(probability, membrane)


def test_a_gap_is_closed():
    probability, section = walls(gap=0.3)
    fusion = choose_fusion([probability], [section])
    assert agreement(probability, section) < 0.8
    assert fusion.w_f > 0
    assert fusion.v_rand > 0.99
    closed = fused_map(probability, fusion)
    assert agreement(closed, section) == fusion.v_rand
    assert cells_between(closed >= 0.5).max() == 3


def test_the_least_weight_that_closes_it_is_taken():
    """On lines p gains w_f / (1 - w_f): 0.25 with 0.2, 0.33 with 0.25; smoothing leaves the lines where they are."""
    for gap, w_f in ((0.3, 0.2), (0.2, 0.25)):
        fusion = choose_fusion(*([a] for a in walls(gap)))
        assert (fusion.w_f, fusion.depth) == (w_f, DEPTHS[0])


def test_clean_cells_are_not_split():
    """Ridges of texture within the cells, as high as the lines of the watershed need."""
    probability, section = walls()
    probability[30, :20] = probability[:, 65] = 0.3
    fusion = choose_fusion([probability], [section])
    assert (fusion.w_f, fusion.depth) == (0.0, DEPTHS[0])
    assert fused_map(probability, fusion) is probability
    assert cells_between(fused_map(probability, Fusion(0.5, 0.02)) >= 0.5).max() > 3  # as it would have been


def test_depth_tells_gaps_from_texture():
    """A gap, and a ridge in a cell as high as it but so thin that after smoothing it is but 0.11 above the cells."""
    probability, section = walls(gap=0.3)
    probability[30, 53:] = 0.3
    fusion = choose_fusion([probability], [section])
    assert (fusion.w_f, fusion.depth, fusion.sigma) == (0.2, 0.2, 1.0)
    assert cells_between(fused_map(probability, fusion) >= 0.5).max() == 3


def test_sections_without_a_cell_do_not_count():
    gap, clean = walls(gap=0.3), walls()
    nothing = (np.ones((9, 9), np.float32), TracedSection(np.ones((9, 9)), np.ones((9, 9), bool)))
    expected = choose_fusion([gap[0], clean[0]], [gap[1], clean[1]])
    told = []
    pairs = zip(gap, nothing, clean, strict=True)
    assert choose_fusion(*pairs, progress=lambda *said: told.append(said)) == expected
    n = len(DEPTHS) * len(SIGMAS)
    assert told == [(i, n) for i in range(1, n + 1)]
    with pytest.raises(ValueError, match=r"^choose_fusion\(\): no section holds a cell"):
        choose_fusion([nothing[0]], [nothing[1]])


def test_fusion_is_chosen_on_the_sections_trained_on(sections, monkeypatch):
    seen = []
    monkeypatch.setattr(
        "limner.methods.membranes.choose_fusion", lambda maps, given: seen.append((maps, given)) or Fusion(0.1, 0.2)
    )
    model, _ = fit(sections, replace(TINY, steps=1))
    ((maps, given),) = seen
    assert given is sections
    assert [p.shape for p in maps] == [s.image.shape for s in sections]
    assert model.fusion == Fusion(0.1, 0.2)


def test_off_the_contours_a_levelled_map_is_the_map():
    probability = np.array([[0.0, 0.3, 0.49, 0.7, 1.0]], np.float32)
    line = np.array([[False, True, False, True, True]])
    np.testing.assert_allclose(levelled(probability, line, 0.2), [[0.0, 0.55, 0.49, 0.95, 1.0]], rtol=1e-6)
    order = np.argsort(fuse(probability, line, 0.2))
    assert (np.diff(levelled(probability, line, 0.2).ravel()[order.ravel()]) >= 0).all()


# ---- in a file ----------------------------------------------------------------------------------------------------


def test_a_model_read_again_finds_the_same(tmp_path, sections, trained, unseen):
    to_model(trained, {"sections": 2}).write(tmp_path / "model")
    file = read_model(tmp_path / "model", TASK)
    again = from_model(file)
    assert (again.settings, again.fusion, again.um_per_px) == (trained.settings, trained.fusion, 0.004)
    assert again.noise == trained.noise == known_noise(sections) > 0
    noisier = replace(trained, settings=replace(trained.settings, noise=0.7))
    assert from_model(to_model(noisier, {})).settings.noise == 0.7
    unknown = to_model(trained, {})
    old = {name: value for name, value in unknown.settings.items() if name != "known_noise"}
    assert from_model(replace(unknown, settings=old)).noise == 0
    assert file.record == {"sections": 2}
    assert not again.network.training
    found, expected = (membrane_map(model.network, unseen.image) for model in (again, trained))
    np.testing.assert_array_equal(found, expected)


def test_a_unet_and_an_unknown_pixel_size_come_back_too(tmp_path, sections):
    model, _ = fit(sections, replace(TINY, steps=1, network="unet"))
    to_model(model, {}).write(tmp_path / "model")
    again = from_model(read_model(tmp_path / "model"))
    assert np.isnan(again.um_per_px)
    assert isinstance(again.network, TiledUNet)
    np.testing.assert_array_equal(
        membrane_map(again.network, sections[0].image), membrane_map(model.network, sections[0].image)
    )


@pytest.mark.parametrize("change", [{"width": 6}, {"batch": -1}, {"fusion": {"w": 1}}, {"colour": "red"}, "fusion"])
def test_a_file_that_does_not_fit_together_is_refused(trained, change):
    file = to_model(trained, {})
    about = dict(file.settings)
    if change == "fusion":
        del about["fusion"]
    else:
        about |= change
    with pytest.raises(ValueError, match=r"^from_model\(\): settings and weights do not fit together \(.*\); train"):
        from_model(replace(file, settings=about))
