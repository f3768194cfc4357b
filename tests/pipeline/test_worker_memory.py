"""A solving worker keeps its buffers: without that the kernel clears their pages anew for every call."""

import json
import platform
import subprocess
import sys

import pytest

SOLVE = """
import json, resource, sys
import torch
from limbeck.pipeline.producer import set_up_torch

if sys.argv[1] == "set up":
    set_up_torch(threads=1, tf32=False)
layer = torch.nn.Conv2d(32, 32, 3, padding=1)
x = torch.zeros(64, 32, 32, 32)
with torch.no_grad():
    layer(x).relu()
    before = resource.getrusage(resource.RUSAGE_SELF)
    for _ in range(20):
        layer(x).relu()
    after = resource.getrusage(resource.RUSAGE_SELF)
print(json.dumps([after.ru_minflt - before.ru_minflt, after.ru_stime - before.ru_stime]))
"""


def cost(mode):
    """Pages that the kernel had to give in 20 calls on samples of 32x32, and its seconds."""
    done = subprocess.run([sys.executable, "-c", SOLVE, mode], capture_output=True, text=True, check=True)
    return json.loads(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators have other habits")
def test_a_worker_asks_the_kernel_for_its_buffers_once():
    bare, ours = cost("bare"), cost("set up")
    assert ours[0] < bare[0] / 8, (bare, ours)
