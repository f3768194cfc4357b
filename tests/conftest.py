"""Every test runs offline, on few threads, from the same seeds, and without a word to anyone."""

import os
import random

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TRANSFORMERS_OFFLINE", "1")
os.environ.setdefault("DIFFUSERS_OFFLINE", "1")
os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("MPLBACKEND", "Agg")

import hypothesis
import numpy as np
import pytest
import torch

from limbeck.storage_schemas.log import log_to_stderr

torch.set_num_threads(1)
log_to_stderr()
hypothesis.settings.register_profile("same examples in every run", derandomize=True)
hypothesis.settings.load_profile("same examples in every run")


def seed() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


def pytest_runtest_setup(item):
    seed()  # what a fixture of several tests draws, too
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True)
def same_draws_alone_and_among_others():
    """What a test draws without a generator of its own is the same in every run, whichever tests ran before it."""
    seed()
