"""Huge pages change where memory lies and nothing else."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from onnx_fixture import export_tiny, tiny_llama

from slimexport.machine import huge_pages
from slimexport.runtime import OnnxDecoder


def test_modes_and_machines_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(huge_pages, "_ENABLED", tmp_path / "enabled")
    assert huge_pages.mode() is None
    assert huge_pages.ask() == 0
    (tmp_path / "enabled").write_text("always [madvise] never\n")
    assert huge_pages.mode() == "madvise"
    (tmp_path / "enabled").write_text("always madvise [never]\n")
    assert huge_pages.ask() == 0
    monkeypatch.setattr(huge_pages.sys, "platform", "darwin")
    assert huge_pages.ask() == 0


@pytest.mark.skipif(huge_pages.mode() not in ("always", "madvise"), reason="this machine has none to give")
def test_memory_stays_what_it_was() -> None:
    import mmap

    with mmap.mmap(-1, 16 * huge_pages.PAGE, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS) as memory:
        array = np.frombuffer(memory, np.uint8)
        array[:] = np.arange(len(array)) % 251
        before = huge_pages.held()
        assert huge_pages.ask() - before >= 8 * huge_pages.PAGE
        assert (array == np.arange(len(array)) % 251).all()
        del array


def test_a_decoder_says_the_same(tmp_path: Path) -> None:
    export_tiny(tiny_llama(), tmp_path / "onnx")
    plain = OnnxDecoder(tmp_path / "onnx", threads=1).greedy(np.arange(9), 6).tokens.tolist()
    decoder = OnnxDecoder(tmp_path / "onnx", threads=1)
    huge_pages.ask()
    assert decoder.greedy(np.arange(9), 6).tokens.tolist() == plain
