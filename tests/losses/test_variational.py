import math

import pytest
import torch
from torch.distributions import Categorical, MixtureSameFamily, Normal, kl_divergence

from limner.losses.variational import image_loss, kl_loss, mixture_bound_loss, mixture_loss, reconstruction_loss

LOSSES = [mixture_loss, mixture_bound_loss]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(shape, seed=0):
    return torch.randn(shape, generator=seeded(seed), dtype=torch.float64)


@pytest.fixture
def case():
    """log f of 3 labels, an image, mu and sigma; 2 images of 4 x 5 pixels."""
    return (
        torch.log_softmax(2 * drawn((2, 3, 4, 5)), dim=1),
        drawn((2, 1, 4, 5), 1),
        torch.tensor([-1.0, 0.5, 2.0], dtype=torch.float64),
        torch.tensor([0.3, 1.0, 0.7], dtype=torch.float64),
    )


def test_kl_is_that_of_torch():
    mean, log_variance = drawn((4, 6)), drawn((4, 6), 1)
    expected = kl_divergence(Normal(mean, (0.5 * log_variance).exp()), Normal(0.0, 1.0)).sum(dim=1).mean()
    torch.testing.assert_close(kl_loss(mean, log_variance), expected)


def test_kl_is_least_at_the_standard_normal():
    mean, log_variance = torch.zeros(2, 1, 3).requires_grad_().unbind()
    loss = kl_loss(mean, log_variance)
    assert loss.item() == 0
    assert all(not g.any() for g in torch.autograd.grad(loss, (mean, log_variance)))


def test_reconstruction_by_hand():
    f = torch.tensor([[0.5, 0.25], [0.5, 0.75]]).reshape(1, 2, 1, 2)  # of two pixels
    assert float(reconstruction_loss(f.log(), torch.tensor([[[0, 1]]]))) == pytest.approx(-math.log(0.5 * 0.75))
    weights = torch.tensor([[[1.0, 0.5]]])
    assert float(reconstruction_loss(f.log(), torch.tensor([[[1, 0]]]), weights)) == pytest.approx(
        -math.log(0.5) - 0.5 * math.log(0.25)
    )


def test_mixture_by_hand():
    """One pixel at 1, two labels at 0 and 1 with sigma 1 and 2."""
    f = torch.tensor([0.25, 0.75]).reshape(1, 2, 1, 1)
    of_first = math.exp(-0.5) / math.sqrt(2 * math.pi)
    of_second = 1 / (2 * math.sqrt(2 * math.pi))
    arguments = f.log(), torch.ones(1, 1, 1, 1), torch.tensor([0.0, 1.0]), torch.tensor([1.0, 2.0])
    assert float(mixture_loss(*arguments)) == pytest.approx(-math.log(0.25 * of_first + 0.75 * of_second))
    assert float(mixture_bound_loss(*arguments)) == pytest.approx(
        -0.25 * math.log(of_first) - 0.75 * math.log(of_second)
    )


def test_mixture_is_that_of_torch(case):
    log_f, image, means, sigmas = case
    pixels = MixtureSameFamily(Categorical(logits=log_f.movedim(1, -1)), Normal(means, sigmas))
    expected = -pixels.log_prob(image[:, 0]).sum(dim=(1, 2)).mean()
    torch.testing.assert_close(mixture_loss(*case), expected)


def test_the_bound_is_above_and_tight_where_f_is_certain(case):
    log_f, image, means, sigmas = case
    assert float(mixture_bound_loss(*case)) > float(mixture_loss(*case)) + 1
    certain = torch.log_softmax(1e3 * log_f, dim=1)
    torch.testing.assert_close(
        mixture_bound_loss(certain, image, means, sigmas), mixture_loss(certain, image, means, sigmas)
    )
    alike = means[:1].expand(3), sigmas[:1].expand(3)
    torch.testing.assert_close(mixture_bound_loss(log_f, image, *alike), mixture_loss(log_f, image, *alike))


@pytest.mark.parametrize("loss", LOSSES)
def test_labels_of_an_order_and_means_of_each_image(loss, case):
    log_f, image, means, sigmas = case
    turned = [2, 0, 1]
    torch.testing.assert_close(loss(log_f[:, turned], image, means[turned], sigmas[turned]), loss(*case))
    shift = torch.tensor([3.0, -2.0], dtype=torch.float64)
    of_each = means + shift[:, None], sigmas.expand(2, 3)
    torch.testing.assert_close(loss(log_f, image + shift.reshape(2, 1, 1, 1), *of_each), loss(*case))


@pytest.mark.parametrize("loss", LOSSES)
def test_another_unit_of_intensity_adds_its_logarithm(loss, case):
    log_f, image, means, sigmas = case
    torch.testing.assert_close(loss(log_f, 10 * image, 10 * means, 10 * sigmas), loss(*case) + 20 * math.log(10))


@pytest.mark.parametrize("loss", LOSSES)
def test_volumes_are_summed_as_sections_are(loss, case):
    log_f, image, means, sigmas = case
    folded = loss(log_f.reshape(2, 3, 2, 2, 5), image.reshape(2, 1, 2, 2, 5), means, sigmas)
    torch.testing.assert_close(folded, loss(*case))


@pytest.mark.parametrize("loss", LOSSES)
def test_gradients(loss, case):
    assert torch.autograd.gradcheck(loss, tuple(t.requires_grad_() for t in case))


@pytest.mark.parametrize("loss", LOSSES)
def test_unknown_pixels_give_neither_loss_nor_gradient(loss, case):
    log_f, image, means, sigmas = case
    weights = torch.ones(2, 4, 5, dtype=torch.float64)
    weights[:, 1:3] = 0
    spoilt = image.clone()
    spoilt[:, :, 1:3] = torch.nan
    log_f.requires_grad_(), means.requires_grad_(), spoilt.requires_grad_()
    found = loss(log_f, spoilt, means, sigmas, weights)
    known = [0, 3]
    torch.testing.assert_close(found, loss(log_f[:, :, known], image[:, :, known], means, sigmas))
    gradients = torch.autograd.grad(found, (log_f, spoilt, means))
    assert not gradients[0][:, :, 1:3].any() and not gradients[1][:, :, 1:3].any()
    assert gradients[0][:, :, known].all() and gradients[2].isfinite().all()


def test_unknown_labels_give_neither_loss_nor_gradient(case):
    log_f = case[0].requires_grad_()
    labels = torch.randint(3, (2, 4, 5), generator=seeded())
    weights = torch.ones(2, 4, 5)
    weights[:, 1:3] = 0
    expected = reconstruction_loss(log_f[:, :, [0, 3]], labels[:, [0, 3]])
    labels[:, 1:3] = -1
    found = reconstruction_loss(log_f, labels, weights)
    torch.testing.assert_close(found, expected)
    (gradient,) = torch.autograd.grad(found, log_f)
    assert not gradient[:, :, 1:3].any() and gradient[:, :, [0, 3]].any()


def test_far_from_every_mean_the_mixture_is_finite():
    """All densities underflow; the loss is the nearest label's, and pulls its mean."""
    means = torch.tensor([0.0, 1.0]).requires_grad_()
    f = torch.full((1, 2, 1, 1), 0.5)
    loss = mixture_loss(f.log(), torch.full((1, 1, 1, 1), 101.0), means, torch.tensor([0.1, 0.1]))
    assert loss.item() == pytest.approx(5e5, rel=1e-4)
    (gradient,) = torch.autograd.grad(loss, means)
    assert gradient.tolist() == [0, pytest.approx(-1e4)]


def test_image_loss_is_that_of_torch(case):
    image, reconstruction = case[1], drawn((2, 1, 4, 5), 3).requires_grad_()
    expected = -Normal(reconstruction, 0.5).log_prob(image).sum(dim=(1, 2, 3)).mean()
    torch.testing.assert_close(image_loss(reconstruction, image, 0.5), expected)
    weights = torch.ones(2, 4, 5)
    weights[0] = 0
    image[0] = torch.nan
    (gradient,) = torch.autograd.grad(image_loss(reconstruction, image, 0.5, weights), reconstruction)
    assert not gradient[0].any() and gradient[1].all()
