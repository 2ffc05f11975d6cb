"""Seconds from a new stroke to the heat map of one section, and to the new result in 3D, in a session that stays open.

    python benchmarks/scribbles_session.py [--out FILE]

100 sections of `stack_stpt_mouse`, 193 x 271, with the hippocampal formation; strokes on four sections, then on a
fifth. Reads LIMNER_DATA (default ../shared/data).
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

from limner.methods.scribbles import Session
from limner.run_record import machine, package_versions
from limner.scribble_settings import Settings
from limner.space import Space
from limner.volume import LabelMap, Volume
from scribble_cases import Case, mouse_stack

FIRST, LAST = 90, 190
DRAWN, NEW = (10, 30, 70, 90), 50


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/scribbles_session.json"))
    given = parser.parse_args()
    whole = mouse_stack()[0]
    space = Space((LAST - FIRST, *whole.images.space.shape[1:]), whole.images.space.spacing)
    images, labels = (part[FIRST:LAST] for part in (whole.images.pixels, whole.labels.labels))
    case = Case(whole.name, whole.organ, Volume(images, space), LabelMap(labels, space), whole.label)
    session = Session.open(case.images, Settings())
    before, after = case.scribbles(DRAWN, 0), case.scribbles((*DRAWN, NEW), 0)
    session.segment(case.scribbles((20, 60), 1))  # compiles
    rows = {}
    for name, work in {
        "first result": lambda: session.segment(before),
        "heat map of the section drawn on": lambda: session.heat_map(after, NEW),
        "result with a new section drawn on": lambda: session.segment(after),
        "result with a new stroke on a drawn section": lambda: session.segment(case.scribbles((*DRAWN, NEW), 1)),
    }.items():
        session.seconds.clear()
        began = time.monotonic()
        work()
        rows[name] = {
            "seconds": round(time.monotonic() - began, 2),
            "of which": {k: round(v, 2) for k, v in session.seconds.items()},
        }
        print(name, rows[name], flush=True)
    result = {"shape": list(space.shape), "rows": rows, "versions": package_versions(), "machine": machine()}
    given.out.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
