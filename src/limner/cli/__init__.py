"""The command line: ``limner stack complete|suggest|align``, ``scribbles fit|segment``, ``nuclei fit|segment``,
``membranes fit|segment``, ``prior fit|segment``, ``evaluate labels|objects|neurites``, ``info``, ``demo``.

Each command is a frozen dataclass in a room of its own, whose fields become its options and whose `run` does the work.
What a command needs is imported when it is run, so that ``limner -h`` answers at once.
"""

from __future__ import annotations

import importlib
import os
import re
import sys
import warnings
from collections.abc import Sequence
from typing import Any, Protocol, TextIO

DESCRIPTION = (
    "Turns incomplete annotations into complete segmentations of biomedical images. `limner COMMAND -h` explains a "
    "command's options; `--version` prints the version; `--debug` shows where an error arose."
)
HELP = {
    "stack": "Stacks of sections of which some are labelled.",
    "stack complete": "Label every section of a stack of which some sections are labelled.",
    "stack suggest": "Say which sections of a completed stack to label next, and why.",
    "stack align": "Turn and shift the sections of a stack so that neighbours fit, and labels with them.",
    "scribbles": "Organs in 3D from a few strokes on a few sections.",
    "scribbles fit": "Train a model on volumes in which organs are labelled in full.",
    "scribbles segment": "Make organs in 3D of strokes, with or without a trained model.",
    "nuclei": "Nuclei of H&E images of which some are outlined.",
    "nuclei fit": "Train a model to find all nuclei on images of which some are outlined.",
    "nuclei segment": "Find all nuclei on images or whole slides with a trained model.",
    "membranes": "Membranes of electron micrographs, and the cells between them.",
    "membranes fit": "Train a model to find membranes on sections in which they are traced.",
    "membranes segment": "Find the membranes of a stack, and the cells between them, with a trained model.",
    "prior": "Brain scans that nobody labelled, by label maps of other subjects.",
    "prior fit": "Learn from label maps what anatomy looks like.",
    "prior segment": "Segment scans of one contrast with what label maps taught.",
    "evaluate": "Compare results with the truth.",
    "evaluate labels": "Accuracy and Dice of a labelled stack against the truth.",
    "evaluate objects": "AJI, panoptic quality and F1 of objects, cells or nuclei, against the true ones.",
    "evaluate neurites": "V_rand, V_info, Rand, warping and pixel error of membranes, or cells, against the truth.",
    "info": "What a file or folder of images or labels holds.",
    "demo": "Complete the sample stack, and score the result against the labels withheld from it.",
}
# commands whose settings come from a method, which imports torch: where their classes live
METHODS = {
    "stack complete": ("stack_complete", "StackComplete"),
    "stack align": ("stack_align", "StackAlign"),
    "scribbles fit": ("scribbles_fit", "ScribblesFit"),
    "scribbles segment": ("scribbles_segment", "ScribblesSegment"),
    "nuclei fit": ("nuclei_fit", "NucleiFit"),
    "nuclei segment": ("nuclei_segment", "NucleiSegment"),
    "membranes fit": ("membranes_fit", "MembranesFit"),
    "membranes segment": ("membranes_segment", "MembranesSegment"),
    "prior fit": ("prior_fit", "PriorFit"),
    "prior segment": ("prior_segment", "PriorSegment"),
}


class Command(Protocol):
    """A parsed command."""

    def run(self, command_line: Sequence[str]) -> int:
        """Do what was asked; returns the exit status."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run Limner's command line.

    Parameters
    ----------
    argv : sequence of str, optional
        Arguments without the program's name; default: the process's own.

    Returns
    -------
    int
        Exit status: 0 done, 2 an error (one line on stderr), 3 some images of a batch failed, 130 stopped by the user.

    Examples
    --------
    >>> main(["info", "no-such-file.nii.gz"])
    2
    """
    given = list(sys.argv[1:] if argv is None else argv)
    arguments = [a for a in given if a != "--debug"]
    if arguments == ["--version"]:
        print(f"limner {_version()}")
        return 0
    try:
        command = _parse(arguments)
        with warnings.catch_warnings():
            warnings.showwarning = _print_warning
            return command.run(["limner", *given])
    except KeyboardInterrupt:
        print("\nStopped.", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `limner info x | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except Exception as error:
        if "--debug" in given:
            raise
        print(f"limner: error: {_one_line(error)}", file=sys.stderr)
        return 2


def _parse(arguments: list[str]) -> Command:
    import tyro
    from tyro.extras import SubcommandApp

    from limner.cli.arguments import only_some
    from limner.cli.demo import Demo
    from limner.cli.evaluate import EvaluateLabels
    from limner.cli.evaluate_neurites import EvaluateNeurites
    from limner.cli.evaluate_objects import EvaluateObjects
    from limner.cli.info import Info
    from limner.cli.stack_suggest import StackSuggest
    from limner.scribble_settings import OF_FIT, Settings

    # the command that is asked for explains itself by its class's docstring, in full
    asked = " ".join(arguments[:2])
    help_of = {name: None if asked == name or arguments[:1] == [name] else text for name, text in HELP.items()}
    classes = {
        "stack suggest": StackSuggest,
        "evaluate labels": EvaluateLabels,
        "evaluate objects": EvaluateObjects,
        "evaluate neurites": EvaluateNeurites,
    }
    groups = {name.split()[0]: SubcommandApp() for name in HELP if " " in name}
    top = SubcommandApp()
    for name in (name for name in HELP if " " in name):
        group, own = name.split()
        groups[group].command(name=own, help=help_of[name])(classes.get(name) or _when_asked(name, asked))
    for group, app in groups.items():
        top.command(app, name=group, help=HELP[group])
    top.command(name="info", help=help_of["info"])(Info)
    top.command(name="demo", help=help_of["demo"])(Demo)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    options = only_some(Settings, OF_FIT) if asked == "scribbles fit" else None
    command: Command = top.cli(prog="limner", description=DESCRIPTION, args=arguments, config=config, registry=options)
    return command


def _when_asked(name: str, asked: str) -> Any:
    """The command's class, or where another command is asked for something with its name and no options."""
    if name != asked:
        return lambda: None
    module, command = METHODS[name]
    return getattr(importlib.import_module(f"limner.cli.{module}"), command)


def _version() -> str:
    from importlib.metadata import version

    return version("limner")


def _one_line(error: Exception) -> str:
    """The message in one line; an error that no function of Limner's raised on purpose also says how to learn more."""
    message = " ".join(str(error).split())
    if isinstance(error, ValueError) and re.match(r"(\w|[.])+\(\): |--|[A-Z]+: |limner ", message):
        return message
    if isinstance(error, OSError) and error.filename is not None:
        return message
    return f"{type(error).__name__}: {message} (the same command with --debug shows where)"


def _print_warning(
    message: Warning | str,
    category: type[Warning],
    filename: str,
    lineno: int,
    file: TextIO | None = None,
    line: str | None = None,
) -> None:
    """A warning as one line without the place in the code, which means nothing to a user."""
    del category, filename, lineno, line
    print(f"limner: warning: {' '.join(str(message).split())}", file=file or sys.stderr)
