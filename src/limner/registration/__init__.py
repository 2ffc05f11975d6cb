"""Warps between images."""
