import pytest
import torch

from limner.networks.embedding import HeatMapHead, PixelEmbedding


@pytest.fixture
def head() -> HeatMapHead:
    torch.manual_seed(0)
    return HeatMapHead(n_features=6, n_classes=4, widths=(8, 5))


def test_an_embedding_by_hand(head):
    """Not linear between layers, linear after the last."""
    pixels = torch.randn(50, 6, generator=torch.Generator().manual_seed(1))
    first, last = head.embedding.layers
    expected = (pixels @ first.weight.T + first.bias).clamp_min(0) @ last.weight.T + last.bias
    found = head.embedding(pixels)
    torch.testing.assert_close(found, expected)
    assert found.min() < 0
    torch.testing.assert_close(head(pixels), expected @ head.discriminating.weight.T + head.discriminating.bias)


def test_default_widths():
    embedding = PixelEmbedding(16)
    assert [(layer.in_features, layer.out_features) for layer in embedding.layers] == [(16, 32), (32, 32), (32, 16)]
    assert embedding.n_outputs == 16
