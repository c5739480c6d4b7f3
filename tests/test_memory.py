import subprocess
import sys

import pytest

from lib.memory import keep_freed_memory

FAULTS = """
import resource, sys
import torch
from lib.memory import keep_freed_memory
if sys.argv[1] == "keep" and not keep_freed_memory():
    sys.exit(3)
def allocate():
    torch.empty(2_000_000).fill_(1.0)
for _ in range(5):
    allocate()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(20):
    allocate()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(way):
    done = subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip("the C library has no mallopt")
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def test_freed_blocks_are_used_again_without_page_faults():
    assert faults("keep") < 100
    assert isinstance(keep_freed_memory(), bool)
