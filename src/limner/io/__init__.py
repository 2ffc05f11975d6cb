"""Read and write image stacks, labels, label tables and section positions; axes are converted here alone.

`read` and `read_labels` take a folder of sections, a TIFF, an OME-Zarr, or a NIfTI, NRRD, MHA or MGZ volume;
`write_result` writes back in the same form. In memory sections lie along the first axis, lengths are mm, order z, y, x.
Images too large for memory go through `open_slide`, `LabelStream` and `GeoJsonStream`, in pixels and micrometres;
stacks too large for memory through `open_sections`, `open_labels` and `write_sections`, section by section.
"""

from limner.io.geojson import GeoJsonStream, rasterise, read_objects
from limner.io.images import names_read, read
from limner.io.label_stack import LabelStack, open_labels
from limner.io.label_tables import TableFormat, default_colour, default_table, read_table, write_table
from limner.io.labels import read_label_image, read_label_volume, read_labels
from limner.io.ome_zarr import LabelStream, write_ome_zarr
from limner.io.outlines import Outline, trace
from limner.io.positions import read_positions
from limner.io.results import label_type, write_images, write_result, write_sections
from limner.io.section_stack import Section, SectionStack, open_sections
from limner.io.slide import Level, Slide, open_slide

__all__ = [
    "GeoJsonStream",
    "LabelStack",
    "LabelStream",
    "Level",
    "Outline",
    "Section",
    "SectionStack",
    "Slide",
    "TableFormat",
    "default_colour",
    "default_table",
    "label_type",
    "names_read",
    "open_labels",
    "open_sections",
    "open_slide",
    "rasterise",
    "read",
    "read_label_image",
    "read_label_volume",
    "read_labels",
    "read_objects",
    "read_positions",
    "read_table",
    "trace",
    "write_images",
    "write_ome_zarr",
    "write_result",
    "write_sections",
    "write_table",
]
