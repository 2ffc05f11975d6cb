"""How long `limner stack complete` will take and how much memory, before it begins.

The constants were measured on one core of a busy machine (docs/benchmarks.md, "Stacks of large sections"); another may
be several times as fast or slow: the order of magnitude is what counts, minutes or hours, and whether memory will do.
"""

from __future__ import annotations

from dataclasses import dataclass

READ, WRITTEN = 0.06, 0.035  # seconds a million pixels of the sections as they are; TIFF takes less, noisy PNG twice it
REGISTERED = 2.5  # seconds a million pixels of a section at the size computed, with label flow
FUSED = 0.5  # seconds a million pixels and structure
TRAINED = 0.15  # seconds a step of training
ADAPTED = 0.5  # seconds a section, for the network's last layer; what is done once a gap shared out
PROGRAM = 0.6e9  # bytes with nothing loaded
SECTION_COPIES = 4  # of one section at its own size, while it is read or written
KEPT = 20  # bytes a pixel of the stack at the size computed, labels and uncertainty
LEVELS = 9  # bytes a pixel and channel of the same: as read, and as grey levels twice
FUSION_COPIES = 8  # of a section's probabilities, float32
LONG = 120  # seconds; of what is shorter nothing is said


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Parameters
    ----------
    sections, unlabelled : int
        Of the stack.
    size, working_size : tuple of int
        (Y, X) of the sections, and of these as they are computed.
    structures : int
        Most on any labelled section.
    steps : int
        Of training; 0 where there is no network.
    jobs : int
        Sections side by side.
    channels : int
        1 for grey, 3 for colour.
    """

    sections: int
    unlabelled: int
    size: tuple[int, int]
    working_size: tuple[int, int]
    structures: int
    steps: int
    jobs: int = 1
    channels: int = 3

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        full, working = (y * x / 1e6 for y, x in (self.size, self.working_size))
        each = FUSED * working * self.structures + (ADAPTED if self.steps else 0.0)
        files = self.sections * full * (READ + WRITTEN)
        return files + self.sections * working * REGISTERED + self.steps * TRAINED + self.unlabelled * each / self.jobs

    @property
    def memory(self) -> float:
        """About how many bytes at most."""
        full, working = (float(y * x) for y, x in (self.size, self.working_size))
        stack = self.sections * working * (self.channels * LEVELS + KEPT)
        fusion = self.jobs * working * self.structures * 4 * FUSION_COPIES
        return PROGRAM + stack + fusion + full * self.channels * SECTION_COPIES

    def __str__(self) -> str:
        """For example "about 40 min and 4 GB of memory"."""
        minutes = max(1, round(self.seconds / 60))
        time = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.0f} h"
        return f"about {time} and {max(1, round(self.memory / 1e9))} GB of memory"

    @property
    def is_long(self) -> bool:
        """Whether it is worth saying."""
        return self.seconds > LONG
