"""The names that `import limner` gives."""

from __future__ import annotations

import subprocess
import sys

import pytest

import limner
import limner.io
from limner.methods import stack_completion


def test_short_names() -> None:
    assert limner.read is limner.io.read
    assert limner.read_labels is limner.io.read_labels
    assert limner.complete_stack is stack_completion.complete
    assert limner.__version__[0].isdigit()
    assert set(limner.__all__) <= set(dir(limner))
    with pytest.raises(AttributeError, match="no attribute 'write'"):
        limner.write  # noqa: B018


def test_importing_limner_imports_nothing_heavy() -> None:
    code = "import sys, limner; sys.exit(bool({'numpy', 'torch'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_package_runs_as_a_program() -> None:
    done = subprocess.run([sys.executable, "-m", "limner", "--version"], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == f"limner {limner.__version__}"
