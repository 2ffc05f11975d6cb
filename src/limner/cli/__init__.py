"""The command line: ``limner stack complete|suggest|align``, ``scribbles fit|segment``, ``nuclei fit|segment``,
``membranes fit|segment``, ``prior fit|segment``, ``evaluate labels|objects|neurites``, ``info``, ``demo``.

Each command is a frozen dataclass in a room of its own, whose fields become its options and whose `run` does the work.
What a command needs is imported when it is run, so that ``limner -h`` answers at once.
"""

from __future__ import annotations

import contextlib
import importlib
import io
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
    except Misunderstood as error:
        print(f"limner: error: {error}", file=sys.stderr)
        return 2
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


class Misunderstood(Exception):
    """Options that are not understood; the message is one line."""


def _parse(arguments: list[str]) -> Command:
    """The command that is asked for.

    Raises
    ------
    Misunderstood
        If options are not understood. What is missing altogether is told in full, with what it means, and ends with
        SystemExit.
    """
    told = io.StringIO()
    try:
        with contextlib.redirect_stderr(told):
            command = _parsed(arguments)
        sys.stderr.write(told.getvalue())
        return command
    except SystemExit:
        message = _in_one_line(told.getvalue(), arguments)
        if message is None:
            sys.stderr.write(told.getvalue())
            raise
        raise Misunderstood(message) from None


def _in_one_line(box: str, arguments: list[str]) -> str | None:
    """What a box of tyro's says, or None where it is no such box or tells what is missing.

    Its first part is the fault, in a part after that may stand what was meant; rules lie between them.
    """
    plain = re.sub(r"\x1b\[[0-9;]*m", "", box)  # colours
    title, *lines = [line.strip("\u2502\u256d\u256e\u2570\u256f ") for line in plain.splitlines()] or [""]
    if not lines or "Required" in title:
        return None
    rules = re.split("(?:^|\n)[\u2500-]{8,}(?:\n|$)", "\n".join(lines).strip("\n"))
    parts = [" ".join(part.split()) for part in rules if part.strip()]
    if not parts:
        return None
    fault, *others = parts
    fault = re.sub(r"invalid literal for int\(\) with base 10: (.*)", r"\1 is no whole number", fault)
    fault = re.sub(r"could not convert string to float: (.*)", r"\1 is no number", fault)
    union = r"(Error parsing [^:]*): No type matching .* could be instantiated from \['?(.*?)'?\].*"
    fault = re.sub(union, r"\1: '\2' is no value for it", fault, flags=re.IGNORECASE)
    for other in sorted(others):  # tyro's order is any
        if other.startswith("Available"):
            fault += f"; {other[0].lower()}{other[1:]}"
        elif meant := re.match(r"(?:Perhaps you meant|Arguments similar to (--[\w-]+)): (--[\w-]+)", other):
            fault += f"; perhaps you meant {meant[2]}" + (f" for {meant[1]}" if meant[1] else "")
    named = [n for n in (" ".join(arguments[:2]), *arguments[:1]) if n in HELP][:1]
    return f"{fault.removesuffix('.')}; `{' '.join(['limner', *named])} -h` explains"


def _parsed(arguments: list[str]) -> Command:
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
