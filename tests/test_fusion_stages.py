"""What is done once for a stack, apart from what tests of the whole method show."""

import subprocess
import sys


def test_optimisers_are_loaded_before_threads_make_them():
    """Loading them in two threads at once fails now and then on Python 3.11."""
    code = """
import sys, numpy as np
from limner.fusion_stages import prepare
from limner.section_fusion import FusionOptions, SectionFusion
from limner.stack_settings import Settings
fusion = SectionFusion(np.zeros((3, 1, 8, 8), np.float32), np.ones((3, 8, 8), np.int32), (0, 2), 0.1 * np.arange(3),
                       (0.05, 0.05), FusionOptions(label_flow=False))
assert "torch._dynamo" not in sys.modules
prepare(fusion, Settings(registration="none"), 2, None, lambda *_: None)
assert "torch._dynamo" in sys.modules
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
