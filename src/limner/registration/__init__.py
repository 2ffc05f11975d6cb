"""Warps between images: `register` finds one, `Registration` carries images and labels along it."""

from limner.registration.velocity_field import Options, Registration, register

__all__ = ["Options", "Registration", "register"]
