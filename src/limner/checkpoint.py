"""What a training that is stopped needs to go on as if it had not been."""

from __future__ import annotations

import io
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from limner.run_record import write_atomically


@dataclass
class Checkpoint:
    """A file that holds the state of a training: network, optimiser, random draws, losses so far.

    A training that goes on from it ends as an uninterrupted one does, to the bit, on the same machine.

    Parameters
    ----------
    path : Path
        The file; its folder must exist.
    key : str
        Hash of all that the training depends on (`limner.run_record.content_key`): a state under another key is not
        taken up.
    seconds : float
        Least time between two writes.

    Examples
    --------
    >>> import tempfile
    >>> network = nn.Linear(2, 1)
    >>> optimiser = torch.optim.Adam(network.parameters())
    >>> checkpoint = Checkpoint(Path(tempfile.mkdtemp(), "state"), key="a", seconds=0)
    >>> checkpoint.keep(network, optimiser, torch.Generator(), [0.5, 0.25])
    >>> checkpoint.restore(network, optimiser, torch.Generator())
    [0.5, 0.25]
    >>> Checkpoint(checkpoint.path, key="b").restore(network, optimiser, torch.Generator())
    []
    """

    path: Path
    key: str
    seconds: float = 30.0
    stopping: bool = field(default=False, init=False)
    _kept: float = field(default_factory=time.monotonic, init=False, repr=False)

    def keep(
        self, network: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator, losses: list[float]
    ) -> None:
        """Write the state as it is after a step, unless the last write was less than `seconds` ago.

        Raises
        ------
        KeyboardInterrupt
            After it was written, if the training is to stop.
        """
        if not self.stopping and time.monotonic() - self._kept < self.seconds:
            return
        state = {
            "key": self.key,
            "network": network.state_dict(),
            "optimiser": optimiser.state_dict(),
            "generator": generator.get_state(),
            "losses": losses,
        }
        write_atomically(self.path, lambda file: torch.save(state, file))
        self._kept = time.monotonic()
        if self.stopping:
            raise KeyboardInterrupt

    @contextmanager
    def stop_after_step(self) -> Iterator[None]:
        """Within, the first Ctrl-C lets the step end and its state be written; the next one stops at once."""

        def stop(*_: object) -> None:
            self.stopping = True
            signal.signal(signal.SIGINT, before)

        before = signal.signal(signal.SIGINT, stop)
        try:
            yield
        finally:
            signal.signal(signal.SIGINT, before)

    def restore(self, network: nn.Module, optimiser: torch.optim.Optimizer, generator: torch.Generator) -> list[float]:
        """Put all three into the state that was kept; returns the losses so far, none where there is no such state."""
        state = self._state()
        if state is None:
            return []
        network.load_state_dict(state["network"])
        optimiser.load_state_dict(state["optimiser"])
        generator.set_state(state["generator"])
        return list(state["losses"])

    @property
    def steps(self) -> int | None:
        """Steps done in the state that was kept: 0 where it is damaged or under another key, None without a file."""
        state = self._state()
        return len(state["losses"]) if state is not None else 0 if self.path.is_file() else None

    def remove(self) -> None:
        """Delete the file where there is one."""
        self.path.unlink(missing_ok=True)

    def _state(self) -> dict[str, Any] | None:
        try:
            state = torch.load(io.BytesIO(self.path.read_bytes()), map_location="cpu", weights_only=True)
            return state if state["key"] == self.key else None
        except Exception:  # torch raises some ten kinds of error on damaged files, IndexError among them
            return None
