"""Puts tests/ on the path (shared helpers live beside the tests) and keeps the Hub out of reach."""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parent))
os.environ["HF_HUB_OFFLINE"] = "1"  # no test may reach the network
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")  # spinning threads ruin machines that are shared
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # there is a worker for every core

APART = "test_families.py"  # its tests share nothing, and are most of the work


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if config.pluginmanager.hasplugin("xdist"):
        for item in items:
            if item.path.name != APART:  # a file's tests share what it took long to make
                item.add_marker(pytest.mark.xdist_group(item.path.name))
    gpu = [item for item in items if item.get_closest_marker("gpu")]
    if gpu:
        import torch

        if not torch.cuda.is_available():
            for item in gpu:
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
