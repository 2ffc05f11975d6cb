"""Limner turns incomplete annotations into complete segmentations of biomedical images."""
