import signal

import pytest
import torch
from torch import nn

from limner.checkpoint import Checkpoint


def state():
    network = nn.Linear(3, 2)
    return network, torch.optim.Adam(network.parameters()), torch.Generator().manual_seed(5)


def step(network, optimiser, generator):
    optimiser.zero_grad()
    network(torch.rand(4, 3, generator=generator)).sum().backward()
    optimiser.step()


def test_all_three_come_back_as_they_were(tmp_path):
    first = state()
    step(*first)
    checkpoint = Checkpoint(tmp_path / "state", "key", seconds=0)
    checkpoint.keep(*first, [0.1])
    other = state()
    assert checkpoint.restore(*other) == [0.1]
    step(*first)
    step(*other)
    assert torch.equal(first[0].weight, other[0].weight)
    assert torch.equal(first[2].get_state(), other[2].get_state())


def test_a_state_of_something_else_or_damaged_is_not_taken_up(tmp_path):
    path = tmp_path / "state"
    assert Checkpoint(path, "key").steps is None
    Checkpoint(path, "key", seconds=0).keep(*state(), [0.1, 0.2])
    assert Checkpoint(path, "key").steps == 2
    assert Checkpoint(path, "other").steps == 0
    untouched = state()
    weight = untouched[0].weight.detach().clone()
    assert Checkpoint(path, "other").restore(*untouched) == []
    assert torch.equal(untouched[0].weight, weight)
    whole = path.read_bytes()
    for damaged in (b"", b"no archive", whole[: len(whole) // 2]):
        path.write_bytes(damaged)
        assert Checkpoint(path, "key").steps == 0


def test_writes_are_spaced_and_the_file_can_be_removed(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", "key", seconds=3600)
    checkpoint.keep(*state(), [0.1])
    assert not checkpoint.path.exists()
    checkpoint.remove()
    Checkpoint(checkpoint.path, "key", seconds=0).keep(*state(), [0.1])
    checkpoint.remove()
    assert list(tmp_path.iterdir()) == []


def test_at_ctrl_c_the_step_ends_and_its_state_is_kept(tmp_path):
    network = nn.Linear(2, 1)
    optimiser = torch.optim.Adam(network.parameters())
    checkpoint = Checkpoint(tmp_path / "state", "a", seconds=1e9)
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), checkpoint.stop_after_step():
        checkpoint.keep(network, optimiser, torch.Generator(), [0.5])
        assert checkpoint.steps is None  # not yet: the last write is less than an age ago
        signal.raise_signal(signal.SIGINT)
        checkpoint.keep(network, optimiser, torch.Generator(), [0.5, 0.25])
    assert checkpoint.steps == 2
    assert signal.getsignal(signal.SIGINT) is before


def test_the_second_ctrl_c_stops_at_once(tmp_path):
    checkpoint = Checkpoint(tmp_path / "state", "a")
    with pytest.raises(KeyboardInterrupt), checkpoint.stop_after_step():
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
