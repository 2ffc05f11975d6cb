"""``limner stack suggest``: which sections of a completed stack to label next, and why."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

from tyro.conf import Positional, arg

if TYPE_CHECKING:  # so that `limner -h` need not wait for numpy
    from limner.run_record import RunRecord
    from limner.section_choice import Suggestion


@dataclass(frozen=True)
class StackSuggest:
    """Say which sections of a completed stack to label next, and why.

    Each is chosen as if those above it were labelled: where much is expected to be wrong and a label would bring many
    sections nearer to one. Only OUT's run.json is read. Label them and give the command that completed the stack again.

    The columns: what labelling the section spares, summed over the sections around it (1 is a whole section wrong); how
    much of the section is expected to be wrong as it is, by its uncertainty and by how much changes between the labels
    on either side; how far it lies from the nearest labelled one; and the structures of which the most is in doubt.
    """

    output: Annotated[Positional[Path], arg(metavar="OUT")]
    """Folder that `limner stack complete` has finished."""
    number: Annotated[int, arg(aliases=["-n"], metavar="N")] = 3
    """How many sections."""

    def run(self, command_line: Sequence[str]) -> int:
        """Print a table, one row a section.

        Raises
        ------
        ValueError
            If OUT holds no finished run, N is below 1 or nothing is left to label.
        """
        del command_line
        if self.number < 1:
            raise ValueError(f"--number: {self.number} is below 1; give how many sections to name")
        record = finished_run(self.output)
        chosen = suggestions(record, self.number)
        if not chosen:
            raise ValueError(f"OUT: {self.output} leaves nothing to suggest; no section is expected to be wrong")
        print_suggestions(record, chosen)
        if len(chosen) < self.number:
            print(f"No more than {len(chosen)} would gain anything.")
        return 0


def finished_run(output: Path) -> RunRecord:
    """The record of a finished `limner stack complete`.

    Raises
    ------
    ValueError
        If there is none, it is of another command or an earlier version, or the run is not finished.
    """
    from limner.run_record import read_record

    path = output / "run.json"
    if not path.is_file():
        raise ValueError(f"OUT: {output} holds no run.json; name a folder that `limner stack complete` made")
    record = read_record(path)
    if "labelled" not in record.options:
        raise ValueError(f"OUT: {output} was made by another command; name a folder that `limner stack complete` made")
    if record.status != "complete":
        raise ValueError(f"OUT: the run in {output} is not finished; give its command again and let it finish")
    if not all("wrong_share" in section for section in record.sections.values()):
        raise ValueError(
            f"OUT: {output} was made by an earlier version of Limner; give its command again with --overwrite"
        )
    return record


def suggestions(record: RunRecord, number: int) -> tuple[Suggestion, ...]:
    """The next sections to label, from the record of a finished run."""
    from limner.section_choice import suggest_sections

    labelled = list(record.options["labelled"])
    sections = {int(z): section for z, section in record.sections.items()}
    count = 1 + max([*labelled, *sections])
    wrong = [sections[z]["wrong_share"] if z in sections else 0.0 for z in range(count)]
    positions = record.settings["positions"] or [z * record.settings["spacing"][0] for z in range(count)]
    return suggest_sections(wrong, positions, labelled, number)


def print_suggestions(record: RunRecord, chosen: Sequence[Suggestion]) -> None:
    """Print the sections in the order in which to label them, each with its reasons."""
    from rich.console import Console
    from rich.table import Table

    table = Table("label", "name", "spares", "wrong now", "to a label", "most in doubt", box=None, pad_edge=False)
    for column in (0, 2, 3, 4):
        table.columns[column].justify = "right"
    for suggestion in chosen:
        section = record.sections[str(suggestion.section)]
        table.add_row(
            str(suggestion.section),
            section["name"],
            f"{suggestion.gain:.2f}",
            f"{suggestion.wrong:.0%}",
            f"{suggestion.distance_mm:.3g} mm",
            ", ".join(section["in_doubt"]),
        )
    Console(highlight=False, markup=False).print(table)
