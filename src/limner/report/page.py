"""What every report has in common: one web page in one file, filled from a template and written in one piece.

A report's template extends ``page.html.j2``, which sets in ``page.css.j2`` and ``page.js.j2`` before the report's own.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path

import jinja2

from limner.run_record import package_versions


def write_page(
    path: Path,
    template: str,
    report: object,
    data: Mapping[str, object],
    pictures: Iterable[Mapping[str, object]],
    **more: object,
) -> None:
    """Fill a template; the file appears under its name only when it is complete, and replaces one that is there.

    Parameters
    ----------
    path : Path
        The file to write, in a folder that exists.
    template : str
        Name of a template in this folder that extends ``page.html.j2``.
    report : object
        Has `title`, `summary`, `notes` and `settings`.
    data : mapping
        What the page's script reads as ``report``; anything JSON knows, so no NaN.
    pictures : iterable of mapping
        Pixels as text, each asked for only when it is written, so that no more than one is held in memory.
    **more
        Further names the template uses.

    Examples
    --------
    >>> write_page(Path("report.html"), "stack.html.j2", report, data, pictures)  # doctest: +SKIP
    """
    page = _environment().get_template(template)
    stream = page.stream(report=report, data=data, pictures=pictures, versions=package_versions(), **more)
    unfinished = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        stream.dump(str(unfinished), encoding="utf-8")
        unfinished.replace(path)
    finally:
        unfinished.unlink(missing_ok=True)


def counted(n: int, thing: str, things: str | None = None) -> str:
    """A number and its noun.

    Examples
    --------
    >>> counted(1, "image"), counted(12345, "nucleus", "nuclei")
    ('1 image', '12,345 nuclei')
    """
    return f"{n:,} {thing if n == 1 else things or thing + 's'}"


def volume_text(mm3: float) -> str:
    """A volume in mm3 to three digits.

    Examples
    --------
    >>> volume_text(0.012345), volume_text(42), volume_text(314.159), volume_text(12345.6)
    ('0.0123', '42.0', '314', '12,346')
    """
    return f"{mm3:#.3g}".rstrip(".") if mm3 < 999.5 else f"{mm3:,.0f}"


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.PackageLoader("limner.report", package_path=""),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
