import math

import pytest
import torch

from limner.networks.vae import Architecture, Decoder, Encoder, ImageVAE, LabelMapVAE, latent_activation, sample

SMALL = {"latent": 5, "width": 2}


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


@pytest.fixture
def randomly_set():
    """All weights drawn, also those of the decoder's last layer, which begin with 0."""

    def set_weights(network):
        for parameter in network.parameters():
            torch.nn.init.normal_(parameter, 0, 0.3, generator=seeded(parameter.numel()))
        return network

    return set_weights


@pytest.mark.parametrize("steepness", [0.5, 1.0, 3.0])
def test_latent_activation(steepness):
    x = [-7.0, -0.1, 0.0, 2.0]
    expected = [steepness * v / (1 + steepness * abs(v)) * math.log(2 + steepness * abs(v)) for v in x]
    torch.testing.assert_close(latent_activation(torch.tensor(x), steepness), torch.tensor(expected))


def test_samples_have_the_mean_and_the_variance():
    mean, variance = torch.tensor([[2.0, -1.0]]).expand(20000, 2), torch.tensor([[4.0, 0.25]]).expand(20000, 2)
    z = sample(mean, variance.log(), seeded())
    torch.testing.assert_close(z.mean(dim=0), mean[0], atol=0.05, rtol=0)
    torch.testing.assert_close(z.var(dim=0), variance[0], atol=0.01, rtol=0.05)
    assert torch.equal(z, sample(mean, variance.log(), seeded()))
    assert not torch.equal(z, sample(mean, variance.log(), seeded(1)))


def test_gradients_pass_through_a_sample():
    """d z / d mean = 1, d z / d log_variance = (z - mean) / 2."""
    mean, log_variance = torch.zeros(2, 1, 3, dtype=torch.float64).requires_grad_().unbind()
    z = sample(mean, log_variance, seeded())
    gradients = torch.autograd.grad(z.sum(), (mean, log_variance))
    torch.testing.assert_close(gradients[0], torch.ones_like(mean))
    torch.testing.assert_close(gradients[1], (z - mean) / 2)


@pytest.mark.parametrize("size", [(32, 32), (21, 30), (1, 3), (9, 40, 33), (32, 32, 32)])
def test_any_size(size, randomly_set):
    network = randomly_set(LabelMapVAE(3, Architecture(size, **SMALL)))
    labels = torch.randint(3, (2, *size), generator=seeded())
    log_f, mean, log_variance = network(labels, torch.zeros(1, 3, *size), seeded())
    assert log_f.shape == (2, 3, *size)
    assert mean.shape == log_variance.shape == (2, 5)
    torch.testing.assert_close(log_f.exp().sum(dim=1), torch.ones(2, *size))
    assert ImageVAE(1, Architecture(size, **SMALL))(labels[:, None].float(), seeded())[0].shape == (2, 1, *size)


def test_five_levels_of_32_features_and_a_code_of_1000():
    architecture = Architecture((160, 192))
    encoder, decoder = Encoder(13, architecture), Decoder(13, architecture)
    assert architecture.grid == (5, 6)
    convolutions = 9 * 13 * 32 + 4 * 9 * 32 * 32 + 5 * 32
    assert sum(p.numel() for p in encoder.parameters()) == convolutions + 2 * (5 * 6 * 32 * 1000 + 1000)
    convolutions = 5 * (9 * 32 * 32 + 32) + 32 * 13 + 13
    assert sum(p.numel() for p in decoder.parameters()) == convolutions + 1000 * 5 * 6 * 32 + 5 * 6 * 32


def test_untrained_the_decoder_is_the_location_prior():
    network = LabelMapVAE(3, Architecture((20, 30), **SMALL))
    location_prior = torch.softmax(torch.randn(1, 3, 20, 30, generator=seeded()), dim=1)
    z = torch.randn(4, 5, generator=seeded(1))
    torch.testing.assert_close(network.decoder(z, location_prior.log()).exp(), location_prior.expand(4, 3, 20, 30))


def test_scores_multiply_the_location_prior(randomly_set):
    """f proportional to exp(score) p_loc: odds are the product of both."""
    decoder = randomly_set(LabelMapVAE(2, Architecture((20, 30), **SMALL))).decoder
    location_prior = torch.tensor([0.75, 0.25]).reshape(1, 2, 1, 1).expand(1, 2, 20, 30)
    z = torch.randn(1, 5, generator=seeded())
    log_f, scores = decoder(z, location_prior.log()), decoder.scores(z)
    assert scores.std() > 0.05
    torch.testing.assert_close(
        log_f[:, 0] - log_f[:, 1], scores[:, 0] - scores[:, 1] + math.log(3), atol=1e-4, rtol=1e-4
    )


def test_what_is_unknown_is_not_seen(randomly_set):
    network = randomly_set(LabelMapVAE(3, Architecture((20, 30), **SMALL)))
    labels = torch.randint(3, (1, 20, 30), generator=seeded())
    weights = torch.ones(1, 20, 30)
    weights[:, 5:9] = 0
    other = labels.clone()
    other[:, 5:9] = 255
    assert torch.equal(network.encode(labels, weights)[0], network.encode(other, weights)[0])
    assert not torch.equal(network.encode(labels, weights)[0], network.encode(labels)[0])
    assert torch.equal(network.encode(labels, torch.ones(1, 20, 30))[0], network.encode(labels)[0])


def test_the_last_row_is_seen_and_made(randomly_set):
    """33 rows are extended to 64, not cut to 32."""
    network = randomly_set(LabelMapVAE(2, Architecture((33, 33), **SMALL)))
    labels = torch.zeros(1, 33, 33, dtype=torch.long)
    other = labels.clone()
    other[:, 32] = 1
    assert not torch.equal(network.encode(labels)[0], network.encode(other)[0])


@pytest.mark.parametrize(
    ("wrong", "said"),
    [({"size": (8,)}, r"size is \(8,\)"), ({"size": (0, 8)}, "size"), ({"size": (8, 8), "levels": 0}, "levels")],
)
def test_an_architecture_that_cannot_be(wrong, said):
    with pytest.raises(ValueError, match=said):
        Architecture(**wrong)


def test_a_code_tells_two_shapes_apart():
    """After a short training each of two maps comes back from its code; the location prior alone gives neither."""
    torch.manual_seed(0)
    labels = torch.zeros(2, 16, 16, dtype=torch.long)
    labels[0, 2:8, 3:13] = 1
    labels[1, 8:14, 3:13] = 1
    network = LabelMapVAE(2, Architecture((16, 16), latent=4, width=4, levels=3))
    log_prior = torch.full((1, 2, 16, 16), 0.5).log()
    optimiser = torch.optim.Adam(network.parameters(), lr=0.02)
    draws = seeded()
    for _ in range(60):
        log_f, mean, log_variance = network(labels, log_prior, draws)
        kl = 0.5 * (mean**2 + log_variance.exp() - log_variance - 1).sum(dim=1).mean()
        loss = kl - log_f.gather(1, labels[:, None]).sum() / 2
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    found = network.decoder(network.encode(labels)[0], log_prior).argmax(dim=1)
    assert float((found == labels).float().mean()) > 0.97
