from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy import ndimage
from skimage.color import hed2rgb
from skimage.measure import label
from skimage.morphology import h_maxima
from torch import nn

from limner.checkpoint import Checkpoint
from limner.methods.partial_nuclei import (
    AnnotatedTile,
    Separation,
    Settings,
    _deep_maxima,
    background_cluster,
    background_weight,
    build,
    choose_patches,
    distance_weight,
    find_nuclei,
    fit,
    from_model,
    rate_at,
    separate,
    to_model,
    train,
    weighted_background_loss,
)
from limner.model_file import read_model
from limner.networks.tiled_unet import TiledUNet

QUICK = Settings(patch=64, stride=32, batch=4, steps=80, rate=1e-2, width=4, um_per_px=0.5, elastic_um=0.5)


def discs(shape=(128, 128), step=32, radius=7):
    """Instance labels of discs on a grid, none of them touching."""
    y, x = np.mgrid[: shape[0], : shape[1]]
    labels = np.zeros(shape, dtype=int)
    for i, (cy, cx) in enumerate(np.ndindex(shape[0] // step, shape[1] // step), start=1):
        labels[(y - step * cy - step // 2) ** 2 + (x - step * cx - step // 2) ** 2 <= radius**2] = i
    return labels


def stained(labels, seed=0):
    """Nuclei in the purple of haematoxylin on the pink of eosin, with noise."""
    purple, pink = np.array([100, 70, 150]), np.array([235, 190, 215])
    image = np.where((labels > 0)[..., None], purple, pink) + np.random.default_rng(seed).normal(
        0, 6, (*labels.shape, 3)
    )
    return image.clip(0, 255).astype(np.uint8)


# ---- what is known about a pixel ----------------------------------------------------------------------------------


def test_distance_weight_is_a_plateau_and_an_exponential():
    nuclei = np.zeros((21, 21), dtype=bool)
    nuclei[10, 10] = True
    weight = distance_weight(nuclei, alpha=3.0, beta=0.5, least=0.05)
    y, x = np.mgrid[:21, :21]
    distance = np.hypot(y - 10, x - 10)
    expected = np.where(distance <= 3, 1, np.exp(-0.5 * (distance - 3)))
    np.testing.assert_allclose(weight, np.where(expected < 0.05, 0, expected), rtol=1e-5)
    assert not weight[0, 0]  # exp(-.5 (14.1 - 3)) is under .05
    assert not distance_weight(np.zeros((4, 4), dtype=bool), 3.0, 0.5).any()


def test_background_cluster_is_the_tissue_between_nuclei_less_a_rim():
    labels = discs()
    cluster = background_cluster(stained(labels), radius=3)
    assert not cluster[labels > 0].any()
    y, x = np.mgrid[:128, :128]
    from_centre = np.hypot(y % 32 - 16, x % 32 - 16)
    assert cluster[from_centre > 12].mean() > 0.95
    assert not cluster[(from_centre > 7) & (from_centre < 9)].any()
    assert not background_cluster(np.full((8, 8, 3), 200, np.uint8), radius=1).any()


def test_background_cluster_follows_the_stronger_stain():
    """Eosin that varies a little must not part the tissue, as it does when both stains are scaled to equal spread."""
    labels = discs()
    draw = np.random.default_rng(0)
    stains = np.zeros((*labels.shape, 3))
    stains[..., 0] = np.where(labels > 0, draw.uniform(0.1, 0.16, labels.shape), draw.uniform(0, 0.06, labels.shape))
    stains[..., 1] = np.where(np.indices(labels.shape)[1] < 64, 0.02, 0.05)
    image = (hed2rgb(stains) * 255).round().astype(np.uint8)
    for seed in range(6):
        cluster = background_cluster(image, radius=0, seed=seed)
        assert cluster[labels > 0].mean() < 0.01
        assert cluster[labels == 0].mean() > 0.99


def test_background_weight_lies_between_the_distance_term_and_one_and_spares_nuclei():
    labels = discs()
    nuclei, cluster = (labels > 0) & (labels < 5), np.random.default_rng(0).random(labels.shape) < 0.5
    weight = background_weight(nuclei, cluster, QUICK)
    m = distance_weight(nuclei, alpha=2.0, beta=0.5)  # 1 um and 1 / um at 0.5 um a pixel
    assert not weight[nuclei].any()
    assert (weight[~nuclei] >= m[~nuclei]).all()
    np.testing.assert_allclose(weight[~nuclei], np.maximum(m, 0.5 * cluster)[~nuclei])
    plain = background_weight(nuclei, cluster, Settings(loss="plain"))
    np.testing.assert_array_equal(plain, ~nuclei)


# ---- the loss -----------------------------------------------------------------------------------------------------


def test_loss_by_hand():
    """A nucleus called so with .9, background with weight .5 called so with .8, and an unknown pixel."""
    p = torch.tensor([[0.1, 0.8, 0.3], [0.9, 0.2, 0.7]]).view(1, 2, 1, 3)
    nuclei, weight = torch.tensor([[[1.0, 0, 0]]]), torch.tensor([[[0.0, 0.5, 0]]])
    expected = -(np.log(0.9) + 0.5 * np.log(0.8)) / 1.5
    assert weighted_background_loss(p.log(), nuclei, weight).item() == pytest.approx(expected, rel=1e-5)


def test_unknown_pixels_give_no_loss_and_no_gradient():
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 2, 6, 7, generator=generator).requires_grad_()
    nuclei, weight = (torch.rand(2, 6, 7, generator=generator) < 0.3).float(), torch.rand(2, 6, 7, generator=generator)
    weight[:, :3] = 0
    weighted_background_loss(logits, nuclei, weight).backward()
    unknown = (weight == 0) & (nuclei == 0)
    assert unknown.any()
    assert not logits.grad.movedim(1, -1)[unknown].any()
    assert logits.grad.movedim(1, -1)[~unknown].abs().sum(dim=-1).min() > 0
    assert weighted_background_loss(logits, torch.zeros(2, 6, 7), torch.zeros(2, 6, 7)).item() == 0


def test_loss_falls_towards_the_truth():
    """The paper prints it without its minus signs."""
    nuclei = torch.tensor([[[1.0, 0.0]]])
    right, wrong = (torch.tensor([[[[-s, s]], [[s, -s]]]]) for s in (2.0, -2.0))
    weight = torch.ones(1, 1, 2)
    assert weighted_background_loss(right, nuclei, weight) < weighted_background_loss(wrong, nuclei, weight)


# ---- training -----------------------------------------------------------------------------------------------------


def test_patches_need_nuclei_and_background_else_any_nucleus():
    labels = discs()
    tile = AnnotatedTile.from_labels(stained(labels), labels, QUICK)
    assert choose_patches(tile, QUICK) == [(y, x) for y in (0, 32, 64) for x in (0, 32, 64)]
    few = AnnotatedTile.from_labels(stained(labels), np.where(labels == 1, 1, 0), QUICK)
    assert choose_patches(few, QUICK) == [(0, 0)]
    none = AnnotatedTile.from_labels(stained(labels), np.zeros_like(labels), QUICK)
    assert choose_patches(none, QUICK) == []


def test_images_smaller_than_a_patch_are_filled_up_with_unknown_pixels():
    labels = discs((32, 96))
    tile = AnnotatedTile.from_labels(stained(labels), labels, QUICK)
    assert tile.image.shape == (64, 96, 3)
    assert not tile.weight[32:].any()
    assert not tile.nuclei[32:].any()
    assert choose_patches(tile, QUICK) == [(0, 0), (0, 32)]


def test_rate_falls_in_steps_to_a_floor():
    paper = Settings(steps=10**6, cooldown=0)
    rates = [rate_at(step, paper) for step in (0, 999, 1000, 2500, 10**6 - 1)]
    np.testing.assert_allclose(rates, [1e-3, 1e-3, 0.95e-3, 0.95**2 * 1e-3, 1e-5])


def test_rate_falls_evenly_in_the_last_share_of_the_steps():
    rates = [rate_at(step, Settings(steps=1000, cooldown=0.4)) for step in (600, 700, 900, 999)]
    np.testing.assert_allclose(rates, [1e-3, 0.75e-3, 0.25e-3, 1e-5])


def trained(settings, kept=1.0):
    """Trained on a tile of 64 nuclei of which a share is annotated; what it says of another tile."""
    labels = discs((256, 256))
    annotated = np.random.default_rng(0).permutation(64)[: round(kept * 64)] + 1
    torch.manual_seed(0)
    network = TiledUNet(widths=(4, 8, 16, 32, 64))
    train(
        network,
        [AnnotatedTile.from_labels(stained(labels), np.where(np.isin(labels, annotated), labels, 0), settings)],
        settings,
    )
    other = discs(step=40)
    image = torch.from_numpy(stained(other, seed=1)).permute(2, 0, 1)[None] / 255
    with torch.inference_mode():
        found = network(image).softmax(dim=1)[0, 1].numpy()
    return found, other


def test_weighted_background_finds_nuclei_that_nobody_drew():
    """A tenth is annotated, most often one of the four in a patch: the plain loss learns that nuclei are background."""
    recall, any_patch = {}, {**vars(QUICK), "least_foreground": 0.0, "least_background": 0.0}
    for loss in ("weighted", "plain"):
        found, truth = trained(Settings(**{**any_patch, "loss": loss}), kept=0.1)
        recall[loss] = (found > 0.5)[truth > 0].mean()
        assert (found > 0.5)[truth == 0].mean() < 0.2
    assert recall["weighted"] > 0.8
    assert recall["plain"] < 0.5


def test_training_is_the_same_for_the_same_seed():
    first, again = (trained(Settings(**{**vars(QUICK), "steps": 3}))[0] for _ in range(2))
    np.testing.assert_array_equal(first, again)


def test_a_loss_that_runs_away_ends_the_training_at_once():
    class Broken(nn.Conv2d):
        def forward(self, image):
            return super().forward(image) * torch.nan

    labels, told = discs(), []
    with pytest.raises(ValueError, match=r"^train\(\): the loss is nan at step 1; give a lower rate"):
        tiles = [AnnotatedTile.from_labels(stained(labels), labels, QUICK)]
        train(Broken(3, 2, 1), tiles, QUICK, progress=lambda *said: told.append(said))
    assert not told


def test_nothing_annotated_is_refused():
    labels = discs()
    with pytest.raises(ValueError, match=r"^train\(\): no nucleus is annotated on any image"):
        train(nn.Conv2d(3, 2, 1), [AnnotatedTile.from_labels(stained(labels), np.zeros_like(labels), QUICK)], QUICK)


class Stopped(Exception):
    pass


@pytest.fixture
def tiles():
    labels = discs()
    return [AnnotatedTile.from_labels(stained(labels), labels, QUICK)]


def test_training_that_was_stopped_ends_as_one_that_was_not(tmp_path, tiles):
    settings = replace(QUICK, steps=7, width=2)
    whole, losses = fit(tiles, settings)

    def stop(step, _):
        if step == 4:
            raise Stopped

    checkpoint = Checkpoint(tmp_path / "state", "key", seconds=0)
    with pytest.raises(Stopped):
        fit(tiles, settings, progress=stop, checkpoint=checkpoint)
    seen = []
    resumed, resumed_losses = fit(tiles, settings, progress=lambda step, _: seen.append(step), checkpoint=checkpoint)
    assert seen == [5, 6, 7]
    assert resumed_losses == losses
    for name, weight in whole.state_dict().items():
        assert torch.equal(weight, resumed.state_dict()[name]), name


def test_training_goes_on_from_another_model(tiles):
    settings = replace(QUICK, steps=2, width=2, rate=1e-12, least_rate=0.0)
    start = to_model(build(replace(settings, seed=9)), replace(settings, seed=9), {})
    network, _ = fit(tiles, settings, start)
    weight = "head.weight"
    torch.testing.assert_close(network.state_dict()[weight], start.weights[weight], atol=1e-6, rtol=0)
    assert not torch.allclose(build(settings).state_dict()[weight], start.weights[weight], atol=1e-3)
    for name, other in (("width", 4), ("um_per_px", 0.25)):
        with pytest.raises(ValueError, match=rf"^fit\(\): the model to start from has {name} "):
            fit(tiles, replace(settings, **{name: other}), start)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *[("um_per_px", 0.0), ("patch", 16), ("steps", 0), ("rate", float("nan")), ("alpha_um", -1.0), ("seed", -1)],
        *[("cluster_weight", 1.5), ("loss", "hinge")],
    ],
)
def test_settings_out_of_range_are_refused(name, value):
    Settings().check()
    with pytest.raises(ValueError, match=rf"^Settings\(\): {name} is "):
        replace(Settings(), **{name: value}).check()


# ---- objects ------------------------------------------------------------------------------------------------------


def test_touching_nuclei_are_split_at_their_neck():
    y, x = np.mgrid[:60, :80]
    pair = (np.hypot(y - 30, x - 28) <= 14) | (np.hypot(y - 30, x - 52) <= 14)
    speck = (np.abs(y - 5) < 2) & (np.abs(x - 70) < 2)
    found = separate((pair | speck).astype(np.float32), 0.25, Separation())
    assert found.max() == 2
    assert found[30, 28] != found[30, 52]
    np.testing.assert_array_equal(found > 0, pair)
    assert separate(pair.astype(np.float32), 0.25, Separation(split=False)).max() == 1
    assert separate(np.zeros((5, 5), np.float32), 0.25, Separation()).max() == 0


def test_thin_nuclei_are_kept_beside_thick_ones():
    found = np.zeros((60, 60), np.float32)
    found[10:30, 10:30] = found[45:47, 5:50] = 1  # the second is one pixel deep, the neck asked for is two
    assert separate(found, 0.25, Separation(neck_um=0.5)).max() == 2
    thin_only = np.where(np.arange(60)[:, None] > 40, found, 0)
    assert separate(thin_only, 0.25, Separation(neck_um=0.5)).max() == 1


def test_small_holes_are_filled_and_the_lumen_of_a_gland_is_not():
    y, x = np.mgrid[:120, :120]
    radius = np.hypot(y - 60, x - 60)
    ring, pale = (radius > 30) & (radius < 40), np.hypot(y - 60, x - 25) < 2
    found = separate((ring & ~pale).astype(np.float32), 0.25, Separation(split=False))
    np.testing.assert_array_equal(found > 0, ring)


def test_seeds_are_those_of_scikit_images_h_maxima():
    draw = np.random.default_rng(0)
    mask = ndimage.gaussian_filter(draw.standard_normal((300, 300)), 6) > 0
    depth = ndimage.gaussian_filter(ndimage.distance_transform_edt(mask), 1)
    found, expected = label(_deep_maxima(depth, 1.0) & mask), label(h_maxima(depth, 1.0) & mask)
    pairs = np.unique(np.stack([found, expected])[:, (found > 0) & (expected > 0)], axis=1)
    assert found.max() == expected.max() == pairs.shape[1] > 20


def test_a_model_comes_back_from_its_file(tmp_path):
    settings = Settings(width=2, seed=3)
    network = build(settings).eval()
    to_model(network, settings, {"seconds": 1.0}).write(tmp_path / "model.safetensors")
    found, found_settings = from_model(read_model(tmp_path / "model.safetensors", "nuclei"))
    image = torch.rand(1, 3, 32, 32)
    assert found_settings == settings
    assert torch.equal(found(image), network(image))
    assert not torch.equal(build(replace(settings, seed=4)).eval()(image), network(image))


def test_a_model_that_does_not_fit_its_settings_is_refused():
    model = to_model(build(Settings(width=2)), Settings(width=4), {})
    with pytest.raises(ValueError, match=r"^from_model\(\): settings and weights do not fit together"):
        from_model(model)
    with pytest.raises(ValueError, match=r"^from_model\(\): settings and weights do not fit together .*colour"):
        from_model(replace(model, settings={"colour": 1}))


def test_nuclei_of_a_whole_image_are_found():
    """A network of one filter that knows the purple from the pink."""

    class Purple(nn.Module):
        halo, alignment = 0, 1

        def forward(self, image, region=(slice(None), slice(None))):
            red = image[:, :1, region[0], region[1]]
            return torch.cat([red - 0.65, 0.65 - red], dim=1) * 100

    labels = discs()
    found = find_nuclei(Purple(), stained(labels), um_per_px=0.5)
    assert found.max() == labels.max()
    np.testing.assert_array_equal(found > 0, labels > 0)
