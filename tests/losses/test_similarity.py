import numpy as np
import pytest
import torch

from limner.losses.similarity import box_mean, global_correlation, local_correlation, local_correlation_loss


def random_pair(seed=0, channels=1, shape=(12, 14)):
    generator = torch.Generator().manual_seed(seed)
    fixed, noise = torch.rand(2, 2, channels, *shape, generator=generator)
    return fixed, 0.5 * fixed + 0.5 * noise


@pytest.mark.parametrize("window", [3, 5, 9])
@pytest.mark.parametrize("noise_variance", [1e-3, 0.05])
def test_local_correlation_in_loops(window, noise_variance):
    fixed, moved = random_pair(channels=2)
    found = local_correlation(fixed, moved, window, noise_variance)
    a, b, half = fixed.double().numpy(), moved.double().numpy(), window // 2
    for n, c, y, x in np.ndindex(*a.shape):
        box = (n, c, slice(max(y - half, 0), y + half + 1), slice(max(x - half, 0), x + half + 1))
        covariance = np.cov(a[box].ravel(), b[box].ravel(), bias=True)
        expected = covariance[0, 1] ** 2 / np.prod(np.diag(covariance) + noise_variance)
        assert float(found[n, c, y, x]) == pytest.approx(expected, abs=1e-4)


def test_local_correlation_does_not_see_linear_changes_of_intensity():
    fixed, moved = random_pair()
    reference = local_correlation(fixed, moved, 5, noise_variance=0.0)
    assert 0.1 < reference.mean() < 0.9
    for changed in (0.5 * moved + 0.3, 1 - moved):
        torch.testing.assert_close(local_correlation(fixed, changed, 5, 0.0), reference, atol=1e-3, rtol=0)
    halves = torch.cat([moved[..., :7], 0.5 * moved[..., 7:] + 0.2], dim=-1)  # a step of brightness, far from x = 2
    torch.testing.assert_close(local_correlation(fixed, halves, 5, 0.0)[..., :5], reference[..., :5])


def test_flat_regions_score_zero():
    fixed, moved = random_pair()
    found = local_correlation(fixed, torch.full_like(moved, 0.4), 5)
    assert found.abs().max() < 1e-5
    assert local_correlation(torch.zeros_like(fixed), torch.zeros_like(fixed), 5).abs().max() == 0


def test_pixels_without_weight_do_not_count():
    fixed, moved = random_pair(shape=(20, 24))
    weights = torch.zeros(2, 1, 20, 24)
    weights[:, :, :, :8] = 1
    moved.requires_grad_(True)
    loss = local_correlation_loss(fixed, moved, weights, window=5)
    loss.sum().backward()
    assert moved.grad[..., 10:].abs().max() == 0  # two pixels beyond the last that counts
    assert moved.grad[..., :10].abs().amax(dim=(1, 2)).min() > 0
    spoiled = moved.detach().clone()
    spoiled[..., 10:] = 1 - fixed[..., 10:] ** 3
    torch.testing.assert_close(local_correlation_loss(fixed, spoiled, weights, 5), loss.detach())


def test_loss_is_one_minus_the_weighted_mean_of_each_pair():
    fixed, moved = random_pair(channels=3)
    weights = torch.rand(2, 1, 12, 14, generator=torch.Generator().manual_seed(1))
    similarity = local_correlation(fixed, moved, 5).mean(dim=1).numpy()
    loss = local_correlation_loss(fixed, moved, weights, 5)
    expected = [1 - np.average(similarity[n], weights=weights[n, 0]) for n in range(2)]
    np.testing.assert_allclose(loss, expected, rtol=1e-5)
    alone = local_correlation_loss(fixed[1:], moved[1:], weights[1:], 5)
    torch.testing.assert_close(alone[0], loss[1])


def test_pair_without_weight_has_loss_one_and_no_gradient():
    fixed, moved = random_pair()
    moved.requires_grad_(True)
    loss = local_correlation_loss(fixed, moved, torch.zeros(2, 1, 12, 14), 5)
    loss.sum().backward()
    assert loss.tolist() == [1, 1]
    assert moved.grad.abs().max() == 0


def test_global_correlation_against_numpy():
    fixed, moved = random_pair(channels=2)
    everywhere = torch.ones(2, 1, 12, 14)
    found = global_correlation(fixed, moved, everywhere)
    for n in range(2):
        expected = np.corrcoef(fixed[n].double().ravel(), moved[n].double().ravel())[0, 1]
        assert float(found[n]) == pytest.approx(expected, abs=1e-5)
    torch.testing.assert_close(global_correlation(fixed, 3 - 2 * fixed, everywhere), -torch.ones(2))
    part = everywhere.clone()
    part[..., 7:] = 0
    cropped = global_correlation(fixed[..., :7], moved[..., :7], everywhere[..., :7])
    torch.testing.assert_close(global_correlation(fixed, moved, part), cropped)


def test_global_correlation_with_a_constant_image_is_zero():
    fixed, _ = random_pair()
    constant = torch.full_like(fixed, 0.5, requires_grad=True)
    found = global_correlation(fixed, constant, torch.ones(2, 1, 12, 14))
    found.sum().backward()
    assert found.abs().max() < 1e-3
    assert constant.grad.isfinite().all()


@pytest.mark.parametrize("window", [3, 9, 13])
def test_box_mean_is_pooling_with_boxes_cut_at_the_border(window):
    image = random_pair(channels=3, shape=(12, 40))[0]
    for each in (image, image.double()):
        pooled = torch.nn.functional.avg_pool2d(each, window, 1, window // 2, count_include_pad=False)
        torch.testing.assert_close(box_mean(each, window), pooled)


def test_loss_with_less_noise_sees_fainter_contrast():
    fixed, _ = random_pair()
    faint = 0.01 * fixed
    weights = torch.ones(2, 1, 12, 14)
    losses = [local_correlation_loss(fixed, faint, weights, 5, noise).mean() for noise in (1e-3, 1e-7)]
    assert losses[1] < 0.1 < 0.9 < losses[0]
