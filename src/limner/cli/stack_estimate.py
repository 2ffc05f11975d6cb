"""How long `limner stack complete` will take and how much memory, before it begins.

The constants were measured on one core of a busy machine (docs/benchmarks.md, "Stacks of large sections"); another may
be several times as fast or slow: the order of magnitude is what counts, minutes or hours, and whether memory will do.
"""

from __future__ import annotations

from dataclasses import dataclass

from limner.section_fusion import MANY

READ, WRITTEN = 0.06, 0.035  # seconds a million pixels of the sections as they are; TIFF takes less, noisy PNG twice it
REGISTERED = 2.5  # seconds a million pixels of a section at the size computed, with label flow
FUSED = 0.5  # seconds a million pixels and structure
NEAR = 16  # structures that are told apart at a pixel, at most, where there are so many that tiles are made
NETWORK_PIXELS = 136  # longer side of the sections for which the next two hold, by the U-Net
TRAINED = 0.12  # seconds a step of training, and a fiftieth more for each structure
ADAPTED = 0.2  # seconds a section for the last layer, a tenth more for each structure; a gap's is shared out
LARGE_NETWORK = 25  # times as long takes the paper's network, and to move a whole network for each section
PROGRAM = 0.6e9  # bytes with nothing loaded
SECTION_COPIES = 4  # of one section at its own size, while it is read or written
KEPT = 20  # bytes a pixel of the stack at the size computed, labels and uncertainty
LEVELS = 9  # bytes a pixel and channel of the same: as read, and as grey levels twice
FUSION_COPIES = 8  # of a section's probabilities, float32
LONG, LARGE = 60, 4e9  # seconds, bytes; of what is shorter and smaller nothing is said


@dataclass(frozen=True)
class Work:
    """What a run has to do.

    Parameters
    ----------
    sections, unlabelled : int
        Of the stack.
    size, working_size : tuple of int
        (Y, X) of the sections, and of these as they are computed.
    structures, all_structures : int
        Most on any labelled section, and of all labelled sections; 0: as many.
    steps : int
        Of training; 0 where there is no network.
    network_pixels : int
        Longer side of the sections that the network sees.
    large_network, whole_network : bool
        Whether it is the paper's, and whether local training and GEM move all of its layers.
    pairs : int
        Registrations for each section.
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
    all_structures: int = 0
    pairs: int = 1
    network_pixels: int = NETWORK_PIXELS
    large_network: bool = False
    whole_network: bool = False

    @property
    def seconds(self) -> float:
        """About how long it takes."""
        full, working = (y * x / 1e6 for y, x in (self.size, self.working_size))
        network = (min(self.network_pixels, max(self.working_size)) / NETWORK_PIXELS) ** 2
        known = self.all_structures or self.structures  # to the network, which has an output for each
        step = TRAINED * network * (1 + known / 50) * (LARGE_NETWORK if self.large_network else 1)
        each = FUSED * working * (self.structures if self.structures <= MANY else NEAR)
        if self.steps:
            adapted = ADAPTED * network * (1 + self.structures / 10)
            each += adapted * (LARGE_NETWORK if self.large_network or self.whole_network else 1)
        files = self.sections * full * (READ + WRITTEN)
        registered = self.sections * working * self.pairs * REGISTERED
        return files + registered + self.steps * step + self.unlabelled * each / self.jobs

    @property
    def memory(self) -> float:
        """About how many bytes at most."""
        full, working = (float(y * x) for y, x in (self.size, self.working_size))
        stack = self.sections * working * (self.channels * LEVELS + KEPT)
        # probabilities of all structures are enlarged; else tiles are made of more than `MANY`
        together = self.structures if self.size != self.working_size else min(self.structures, MANY)
        fusion = self.jobs * working * together * 4 * FUSION_COPIES
        return PROGRAM + stack + fusion + full * self.channels * SECTION_COPIES

    def __str__(self) -> str:
        """For example "about 40 min and 4 GB of memory"."""
        minutes = max(1, round(self.seconds / 60))
        time = f"{minutes} min" if minutes < 90 else f"{minutes / 60:.0f} h"
        return f"about {time} and {max(1, round(self.memory / 1e9))} GB of memory"

    @property
    def is_long(self) -> bool:
        """Whether it is worth saying."""
        return self.seconds > LONG or self.memory > LARGE
