"""Settings of stack completion: the method's, and those of its fusion and network among them; the command line is made
of these."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args, get_origin, get_type_hints

from limner.registration.velocity_field import Start

ALGORITHM = 6  # raised with every change that alters results: stages stored before it are then made anew
LOWEST = {  # of each number in Settings; HIGHEST is the same for all
    **{"network_pixels": 1, "training_steps": 1, "local_steps": 0, "iterations": 0, "m_steps": 0, "seed": 0},
    **{"stiffness": 0, "rho": 0, "sigma": 1e-3, "alpha": 0, "clip_mm": 1e-6, "placement": 0, "halved": 0},
    **{"weight_of_network": 0, "prior": 0, "gem_prior": 0},
}
HIGHEST = 1e12


@dataclass(frozen=True)
class Settings:
    """What can be chosen. Values of the paper are named; a default that differs says why."""

    method: Literal["network", "fusion", "product", "gem"] = "gem"
    """Evidence used: the network alone, fusion alone, their product, or both in one model (generalised EM)."""
    registration: Literal["chained", "direct", "none"] = "chained"
    """Register section to section and follow the chain, or labelled sections directly (paper), or not at all."""
    start: Start = "affine"
    """What each registration seeks before it deforms."""
    stiffness: float = 0.0
    """Resistance of registration to deforming. 0: 10 from section to section, where errors add up along the chain, and
    1 for 'direct', which follows stronger local warps, and texture with them."""
    fusion: Literal["blended", "normalised", "printed"] = "blended"
    """Blend signed distances along z, or mix two atlases with each one's odds normalised, or as the paper's Eq. 4."""
    interpolation: Literal["linear", "catmull-rom"] = "catmull-rom"
    """How 'blended' fusion interpolates along z: two labelled sections or up to four."""
    label_flow: bool = True
    """Let 'blended' fusion carry the neighbours' labels towards each other by what registration left between them;
    not with 'direct' registration, whose fields do not add up along the way."""
    mirror: bool = False
    """For specimens with two like halves, left and right: 'blended' fusion also asks the mirror image of the stack,
    where left-out labelled sections come out clearly better with it. Not where rho is given. Everything is fitted
    anew when labels change."""
    rho: float = 0.0
    """LogOdds per mm of signed distance (paper: 21). 0: for 'blended' fitted on left-out sections, else 21."""
    sigma: float = 20.0
    """Standard deviation of 8-bit grey levels between atlas and section (paper: 20); not for 'blended'."""
    alpha: float = 1.0
    """Decay of an atlas's weight with distance, per mm (paper: 1); not for 'blended'."""
    clip_mm: float = 1.0
    """Signed distances beyond this are cut, mm. 1 measured better than 3 on the mouse stack."""
    network: Literal["unet", "fcn_vgg16"] = "unet"
    """A small U-Net, or the paper's FCN-8s on VGG-16 (too slow for whole stacks without a GPU)."""
    vgg16_weights: str = ""
    """File of VGG-16 weights with torchvision's names, for fcn_vgg16; empty: from scratch."""
    network_pixels: int = 136
    """Longer side of the sections as the network sees them, pixels; predictions are enlarged again."""
    training_steps: int = 4000
    """Global training: gradient steps, four labelled sections each."""
    halved: float = 0.0
    """Share of these, from the first, on sections half as long and wide, which cost a third to a quarter; of the U-Net
    alone. 0 (paper), as 0.5, which trains in half the time, was not shown to be as good on left-out sections."""
    placement: float = 0.3
    """How far training moves sections: 1 is up to 10 degrees, 5 % shift, 10 % scaling, for sections that lie unlike."""
    local_steps: int = 60
    """Local training: gradient steps on the two neighbouring labelled sections."""
    trained_layers: Literal["last", "all"] = "last"
    """What local training and the M-step move: the last layer, or the whole network (paper)."""
    weight_of_network: float = 0.0
    """lambda, the power of p_d beside p_f (paper: 2). 0: fitted on left-out sections, less where labels are near."""
    divide_by_frequency: bool = True
    """Divide p_d by how frequent each structure is, as fusion carries the prior already (paper: no)."""
    prior: float = 1e-4
    """L2 prior on the weights in local training, nats a pixel."""
    gem_prior: float = 0.1
    """L2 prior on the weights in GEM, nats a pixel (paper: that of `prior`)."""
    gem_centre: Literal["learnt", "zero"] = "learnt"
    """From where that prior holds the weights: from what local training learnt, or from zero (paper)."""
    iterations: int = 10
    """Most EM iterations."""
    m_steps: int = 15
    """Gradient steps in an M-step."""
    seed: int = 0
    """Seed of every random draw."""

    def check(self) -> None:
        """Raise ValueError for a number out of range, a name that is none of the choices, or what has no part."""
        for name, lowest in LOWEST.items():
            value = getattr(self, name)
            if not lowest <= value <= HIGHEST:  # NaN is not
                raise ValueError(f"Settings(): {name} is {value}; give a number from {lowest:g} to {HIGHEST:g}")
        for name, hint in get_type_hints(Settings).items():
            if get_origin(hint) is Literal and getattr(self, name) not in get_args(hint):
                choices = ", ".join(get_args(hint))
                raise ValueError(f"Settings(): {name} is {getattr(self, name)!r}; give one of {choices}")
        if self.mirror and (self.fusion != "blended" or self.rho or self.method == "network"):
            found = f"method {self.method}, {self.fusion} fusion and rho {self.rho:g}"
            raise ValueError(
                f"Settings(): mirror speaks in blended fusion with rho fitted, not in {found}; drop mirror"
            )
