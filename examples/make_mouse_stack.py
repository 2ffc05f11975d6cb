"""Cut the sample `examples/data/mouse_stack` out of the full mouse stack.

    python examples/make_mouse_stack.py [DATA]

DATA holds ``stack_stpt_mouse``; without it the environment's LIMNER_DATA counts, else ``../shared/data``. See NOTICE.md
in the sample's folder for where images and labels come from and under which terms they may be used.
"""

from __future__ import annotations

import csv
import os
import sys
from pathlib import Path

import SimpleITK as sitk

FIRST, LAST, STEP = 90, 150, 10
SAMPLE = Path(__file__).parent / "data" / "mouse_stack"
# neighbours in the brain must be told apart on a screen, which the atlas's own greens are not
COLOURS = {
    1: (78, 121, 167),
    2: (118, 183, 178),
    3: (89, 161, 79),
    4: (237, 201, 72),
    5: (242, 142, 43),
    6: (255, 190, 125),
    7: (225, 87, 89),
    8: (176, 122, 161),
    9: (255, 157, 167),
    10: (211, 114, 149),
    11: (157, 118, 96),
    12: (182, 153, 45),
    13: (200, 200, 200),
    14: (73, 73, 163),
    15: (134, 188, 182),
}


def main(data: Path) -> None:
    """Write images, truth, labels and the label table of sections FIRST to LAST."""
    stack = data / "stack_stpt_mouse"
    if not stack.is_dir():
        sys.exit(f"make_mouse_stack: {stack} is no folder; name the data's folder, or set LIMNER_DATA")
    SAMPLE.mkdir(parents=True, exist_ok=True)
    images = sitk.ReadImage(str(stack / "stpt_native_50x40x40um.nii.gz"))[:, :, FIRST : LAST + 1]
    truth = sitk.ReadImage(str(stack / "coarse_native_50x40x40um.nii.gz"))[:, :, FIRST : LAST + 1]
    labels = sitk.Image(truth)
    for z in range(labels.GetSize()[2]):
        if z % STEP:
            labels[:, :, z] = 0
    for name, volume in (("images", images), ("truth", truth), ("labels", labels)):
        sitk.WriteImage(volume, str(SAMPLE / f"{name}.nii.gz"), useCompression=True, compressionLevel=9)
    write_table(stack / "coarse_lut.csv", SAMPLE / "structures.csv")


def write_table(source: Path, target: Path) -> None:
    """Write the names of `source` (columns coarse, name) with colours (columns index, name, r, g, b)."""
    with source.open(newline="") as lines, target.open("w", newline="") as out:
        writer = csv.writer(out, lineterminator="\n")
        writer.writerow(("index", "name", "r", "g", "b"))
        for row in csv.DictReader(lines):
            index = int(row["coarse"])
            if index:
                writer.writerow((index, row["name"], *COLOURS[index]))


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else os.environ.get("LIMNER_DATA", "../shared/data")))
