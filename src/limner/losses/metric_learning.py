"""Discriminative deep metric learning: pixels of one class close together, pixels of different classes far apart."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def generalised_logistic(z: Tensor, beta: float) -> Tensor:
    """log(1 + exp(beta z)) / beta: a smooth max(z, 0), the sharper the larger `beta`; same shape as `z`.

    Examples
    --------
    >>> generalised_logistic(torch.tensor([-9.0, 0.0, 9.0]), beta=2.0)
    tensor([7.6150e-09, 3.4657e-01, 9.0000e+00])
    """
    return F.softplus(beta * z, threshold=100.0) / beta


def pair_loss(first: Tensor, second: Tensor, same: Tensor, tau: float = 2.0, beta: float = 1.0) -> Tensor:
    """Half the mean over pairs of g(1 - l (tau - d2)), d2 being the squared distance, l 1 for the same class, else -1.

    Pairs of one class are pulled to below tau - 1, the others pushed to above tau + 1.

    Parameters
    ----------
    first, second : Tensor
        Places of the two pixels of each pair, shape (N, D).
    same : Tensor of bool
        Whether a pair is of one class, shape (N,).
    tau : float
        Threshold of the squared distance, above 1.
    beta : float
        Sharpness of g, `generalised_logistic`.

    Returns
    -------
    Tensor
        Scalar, >= 0.

    References
    ----------
    .. [1] Hu, Lu, Tan, "Discriminative deep metric learning for face verification in the wild", CVPR 2014,
       https://doi.org/10.1109/CVPR.2014.242. Departure: a mean over the pairs, not their sum.

    Examples
    --------
    >>> place = torch.zeros(1, 2)
    >>> same, other = torch.tensor([True]), torch.tensor([False])
    >>> float(pair_loss(place, place, same, beta=50.0)) < 1e-6, float(pair_loss(place, place, other, beta=50.0))
    (True, 1.5)
    """
    squared = (first - second).square().sum(dim=1)
    sign = torch.where(same, 1.0, -1.0)
    return generalised_logistic(1 - sign * (tau - squared), beta).mean() / 2


def weight_loss(layers: Iterable[nn.Linear]) -> Tensor:
    """Half the sum over layers of ||W||_F^2 + ||b||^2; scalar."""
    return torch.stack([p.square().sum() for layer in layers for p in layer.parameters()]).sum() / 2


def metric_learning_loss(
    first: Tensor,
    second: Tensor,
    same: Tensor,
    layers: Iterable[nn.Linear],
    *,
    tau: float = 2.0,
    beta: float = 1.0,
    lam: float = 1e-4,
) -> Tensor:
    """`pair_loss` + lam `weight_loss`, what metric learning minimises.

    Parameters
    ----------
    first, second, same, tau, beta
        As of `pair_loss`.
    layers : iterable of nn.Linear
        The layers of the embedding.
    lam : float
        Weight of the layers' weights.

    Returns
    -------
    Tensor
        Scalar, >= 0.
    """
    return pair_loss(first, second, same, tau, beta) + lam * weight_loss(layers)


def sample_pairs(labels: Tensor, n_pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
    """Draw pairs of pixels, half of one class and half of two, every class and pair of classes as often as any other.

    No list of all pairs is made: time and memory go with the pixels and `n_pairs`. For many steps of training draw all
    their pairs at once and split them.

    Parameters
    ----------
    labels : Tensor of int
        Class of each pixel, shape (N,).
    n_pairs : int
        How many to draw, with replacement; of an odd number one more is of two classes.
    generator : torch.Generator
        On the CPU; decides every draw.

    Returns
    -------
    first, second : Tensor of int
        Indices into `labels`, shape (n_pairs,), in an order by chance. The two pixels of a pair differ, but where a
        class has a single pixel.
    same : Tensor of bool
        Whether the two are of one class, shape (n_pairs,).

    Raises
    ------
    ValueError
        If there are fewer than two classes.

    Examples
    --------
    >>> labels = torch.tensor([0, 0, 0, 0, 0, 0, 0, 4])
    >>> first, second, same = sample_pairs(labels, 10, torch.Generator().manual_seed(0))
    >>> int(same.sum()), bool(((labels[first] == labels[second]) == same).all())
    (5, True)
    """
    order = torch.argsort(labels.cpu(), stable=True)
    counts = torch.unique(labels.cpu(), return_counts=True)[1]
    if len(counts) < 2:
        raise ValueError(f"sample_pairs(): there are pixels of {len(counts)} class; give pixels of two or more")
    starts = counts.cumsum(0) - counts

    def below(limits: Tensor) -> Tensor:
        """Integers in [0, limit), one for each limit."""
        draws = torch.rand(len(limits), generator=generator, dtype=torch.float64) * limits
        return draws.long().minimum(limits - 1)

    same = torch.randperm(n_pairs, generator=generator) < n_pairs // 2
    class_of_first = below(torch.full((n_pairs,), len(counts)))
    onwards = 1 + below(torch.full((n_pairs,), len(counts) - 1))
    class_of_second = torch.where(same, class_of_first, (class_of_first + onwards) % len(counts))
    first = below(counts[class_of_first])
    another = first + 1 + below((counts[class_of_first] - 1).clamp_min(1))
    second = torch.where(same, another % counts[class_of_first], below(counts[class_of_second]))
    chosen = (order[starts[class_of_first] + first], order[starts[class_of_second] + second])
    return chosen[0].to(labels.device), chosen[1].to(labels.device), same.to(labels.device)
