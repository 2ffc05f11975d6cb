"""The command line: ``limner stack complete``, ``nuclei fit|segment``, ``evaluate labels|objects``, ``info``, ``demo``.

Each command is a frozen dataclass in a room of its own, whose fields become its options and whose `run` does the work.
What a command needs is imported when it is run, so that ``limner -h`` answers at once.
"""

from __future__ import annotations

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
    "complete": "Label every section of a stack of which some sections are labelled.",
    "nuclei": "Nuclei of H&E images of which some are outlined.",
    "fit": "Train a model to find all nuclei on images of which some are outlined.",
    "segment": "Find all nuclei on images or whole slides with a trained model.",
    "evaluate": "Compare results with the truth.",
    "labels": "Accuracy and Dice of a labelled stack against the truth.",
    "objects": "AJI, panoptic quality and F1 of objects, cells or nuclei, against the true ones.",
    "info": "What a file or folder of images or labels holds.",
    "demo": "Complete the sample stack, and score the result against the labels withheld from it.",
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

    from limner.cli.demo import Demo
    from limner.cli.evaluate import EvaluateLabels
    from limner.cli.evaluate_objects import EvaluateObjects
    from limner.cli.info import Info

    # the command that is asked for explains itself by its class's docstring, in full
    help_of: dict[str, str | None] = {name: None if name in arguments[:2] else text for name, text in HELP.items()}
    stack, nuclei, evaluate, top = SubcommandApp(), SubcommandApp(), SubcommandApp(), SubcommandApp()
    stack.command(name="complete", help=help_of["complete"])(_stack_complete(arguments))
    nuclei.command(name="fit", help=help_of["fit"])(_nuclei_fit(arguments))
    nuclei.command(name="segment", help=help_of["segment"])(_nuclei_segment(arguments))
    evaluate.command(name="labels", help=help_of["labels"])(EvaluateLabels)
    evaluate.command(name="objects", help=help_of["objects"])(EvaluateObjects)
    top.command(stack, name="stack", help=HELP["stack"])
    top.command(nuclei, name="nuclei", help=HELP["nuclei"])
    top.command(evaluate, name="evaluate", help=HELP["evaluate"])
    top.command(name="info", help=help_of["info"])(Info)
    top.command(name="demo", help=help_of["demo"])(Demo)
    config = (tyro.conf.OmitArgPrefixes, tyro.conf.OmitSubcommandPrefixes)
    command: Command = top.cli(prog="limner", description=DESCRIPTION, args=arguments, config=config)
    return command


def _stack_complete(arguments: Sequence[str]) -> Any:
    """The command's class, or where another command is asked for something with its name and no options."""
    if list(arguments[:2]) != ["stack", "complete"]:
        return lambda: None
    from limner.cli.stack_complete import StackComplete  # its settings come from the method, which imports torch

    return StackComplete


def _nuclei_fit(arguments: Sequence[str]) -> Any:
    """As `_stack_complete`."""
    if list(arguments[:2]) != ["nuclei", "fit"]:
        return lambda: None
    from limner.cli.nuclei_fit import NucleiFit

    return NucleiFit


def _nuclei_segment(arguments: Sequence[str]) -> Any:
    """As `_stack_complete`."""
    if list(arguments[:2]) != ["nuclei", "segment"]:
        return lambda: None
    from limner.cli.nuclei_segment import NucleiSegment

    return NucleiSegment


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
