"""The shrunk checkpoint and the dense baseline through the same target, each checked before it is put into place; the
baseline is kept by content hash."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import shutil
import time
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from slimexport.artifacts import (
    ExportArtifact,
    ModelSource,
    from_dict,
    is_quantised,
    read_json,
    remove,
    sha256_tree,
    staged_directory,
    write_json,
)
from slimexport.environment import version
from slimexport.errors import BadInputError
from slimexport.run_directory import BASELINE, NUMERICS, RunDirectory, lock_file
from slimexport.stages.inputs import (
    ANEW,
    baselines,
    check_files,
    dense_model,
    export_names,
    export_options,
    exports,
    fields_of,
    rounds_by_text,
)

if TYPE_CHECKING:
    from slimexport.config import RunConfig
    from slimexport.progress import Progress

GRAPH_PACKAGES = (
    "slimexport", "mobius-onnx", "onnx", "onnx-ir", "onnxscript", "transformers", "torch", "numpy", "onnxruntime",
    "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda", "gguf", "xllamacpp",
)  # fmt: skip
CACHE_WAIT = 900.0  # seconds for another run that is just making the same baseline


def export_stage(
    directory: RunDirectory, config: RunConfig, progress: Progress, *, force: bool = False
) -> dict[str, ExportArtifact]:
    from slimexport.targets.base import load_artifact

    if not directory.done("prune"):
        raise BadInputError(f"{directory.path} holds no finished checkpoint; run with --resume to finish it.")
    trained = {"recover": directory.key("recover")} if directory.done("recover") else {}
    key = {"prune": directory.key("prune"), **trained, **fields_of(config, "export")}
    names = export_names(config)
    if directory.done("export", key) and not force and all((directory / n).is_dir() for n in names):
        return {name: load_artifact(directory / name) for name in names}
    checkpoint = directory.shrunk()
    place = directory / checkpoint.path
    check_files(place, checkpoint.files, advice=ANEW)
    directory.begin("export")
    started = time.monotonic()
    of = hashlib.sha256(json.dumps(dict(checkpoint.files), sort_keys=True).encode()).hexdigest()
    kept = directory.state.get("exports", {})  # of a stage that was stopped at a later one, too
    for name in set(directory.exported()) - set(names):  # what other options made of another checkpoint is no one's
        if force or kept.get(name, {}).get("checkpoint") != of:
            remove(directory / name)
    source = from_dict(ModelSource, directory.state["source"], "run.json")
    numerics: dict[str, Any] = {}
    with progress.stage("export"):
        text = _rounding_text(place, config)
        for name, kind in exports(config).items():
            exported, same = directory / name, _key(of, kind, config, text)
            made = None if force else _unchanged(kept.get(name, {}), exported, same)
            if made is None:
                made = export_checkpoint(place, exported, kind, config, progress, text)
                kept = {**kept, name: {"checkpoint": of, **_record_of(exported, same, made)}}
                directory.save(exports=kept)
            else:
                progress.note(f"{name}: is there already")
            numerics[name] = made
        for name, kind in baselines(config).items():
            dense = f"{BASELINE}/{name}"
            numerics[dense] = baseline_for(source, directory / dense, kind, config, progress, text)
    write_json(directory / NUMERICS, numerics)
    directory.save_config(fields_of(config, "export"))
    directory.finish("export", key, time.monotonic() - started)
    return {name: load_artifact(directory / name) for name in names}


Kind = tuple[str, str]
"""Target and precision."""
Windows = NDArray[np.int64] | None


def _rounding_text(checkpoint: Path, config: RunConfig) -> Windows:
    """None where nothing needs one."""
    if not rounds_by_text(config):
        return None
    from transformers import AutoTokenizer

    from slimexport.calibration import rounding_windows

    return rounding_windows(config, AutoTokenizer.from_pretrained(str(checkpoint), trust_remote_code=False))


def export_checkpoint(
    checkpoint: Path, place: Path, kind: Kind, config: RunConfig, progress: Progress, text: Windows = None
) -> dict[str, Any]:
    """Exports the shrunk model to `place` and returns how its logits compare with torch."""
    from slimexport.checkpoint import load

    progress.note(f"{place.name}: shrunk model")
    model, tokenizer = load(checkpoint)
    return _export_model(model, tokenizer, place, kind, config, text)


def baseline_for(
    source: ModelSource, place: Path, kind: Kind, config: RunConfig, progress: Progress, text: Windows = None
) -> dict[str, Any]:
    """The dense model through the same export, in `place`; taken from there, or from the cache, where it is already.

    Raises BadInputError where the model is no longer the one that was pruned.
    """
    key = _key(source.fingerprint, kind, config, text)
    numerics = _intact(place, key)
    if numerics is not None:
        progress.note(f"{place.name}: baseline is there already")
        return numerics
    if config.baseline_cache is None:
        return _make_baseline(source, place, key, kind, config, progress, text)
    cache = config.baseline_cache
    cache.mkdir(parents=True, exist_ok=True)
    kept = cache / key / place.name
    busy = f"The baseline cache {cache} has been locked by another run for {CACHE_WAIT:.0f} s."
    if (cache / f"{key}.lock").exists():
        progress.note(f"{place.name}: waiting for another run that may be writing to {cache}")
    with lock_file(cache / f"{key}.lock", busy, CACHE_WAIT):
        numerics = _intact(kept, key)
        if numerics is None:
            numerics = _make_baseline(source, kept, key, kind, config, progress, text)
        else:
            progress.note(f"{place.name}: baseline from {cache}")
        with staged_directory(place) as partial:
            shutil.copytree(kept, partial, dirs_exist_ok=True)
        write_json(_record(place), read_json(_record(kept)))
    return numerics


def _make_baseline(
    source: ModelSource, place: Path, key: str, kind: Kind, config: RunConfig, progress: Progress, text: Windows
) -> dict[str, Any]:
    progress.note(f"{place.name}: dense baseline")
    loaded = dense_model(config, source.fingerprint)
    _record(place).unlink(missing_ok=True)
    numerics = _export_model(loaded.model, loaded.tokenizer, place, kind, config, text)
    write_json(_record(place), _record_of(place, key, numerics))
    return numerics


def _export_model(
    model: Any, tokenizer: Any, place: Path, kind: Kind, config: RunConfig, text: Windows
) -> dict[str, Any]:
    from slimexport.runtime import Decoder, open_decoder
    from slimexport.streaming.model import mapped_in_float32
    from slimexport.targets import registry
    from slimexport.verification.numerics import check_export

    numerics: dict[str, Any] = {}
    light = config.verify == "light"

    def opened(artifact: ExportArtifact) -> Decoder:
        options = (config.provider, config.threads, config.provider_options)
        return open_decoder(Path(artifact.path), *options, mapped=light)

    def check(artifact: ExportArtifact, reference: ExportArtifact | None = None) -> None:
        against = opened(reference) if reference else model
        found = check_export(opened(artifact), against, seed=config.seed, light=light)
        before = [*numerics.pop("before", ()), dict(numerics)] if reference else []
        numerics.clear()
        numerics.update({**found, "before": before} if before else found)

    target, precision = kind
    options = dataclasses.replace(export_options(config, precision), text=text)
    scratch = place.parent / f".{place.name}.float32.partial"
    remove(scratch)  # of a run that was killed
    try:
        model = mapped_in_float32(model, scratch) if light else model.float()
        with staged_directory(place) as partial:
            registry.get(target).export(model, tokenizer, partial, options, check)
    finally:
        remove(scratch)
    return numerics


def _record_of(place: Path, key: str, numerics: dict[str, Any]) -> dict[str, Any]:
    """The key that an exported directory was made for, the hash of every file, its numerics."""
    return {"key": key, "files": sha256_tree(place), "numerics": numerics}


def _unchanged(record: Mapping[str, Any], place: Path, key: str) -> dict[str, Any] | None:
    """The numerics in `record`, if what is in `place` was made for `key` and no byte of it has changed."""
    if record.get("key") != key or not place.is_dir() or record.get("files") != sha256_tree(place):
        return None
    numerics: dict[str, Any] = record["numerics"]
    return numerics


def _record(place: Path) -> Path:
    """Where the record of a baseline is: beside its directory."""
    return place.parent / f"{place.name}.json"


def _intact(place: Path, key: str) -> dict[str, Any] | None:
    """`_unchanged` of the baseline in `place`; None where it has no record that can be read."""
    try:
        return _unchanged(read_json(_record(place)), place, key)
    except BadInputError:
        return None


def _key(fingerprint: str, kind: Kind, config: RunConfig, text: Windows) -> str:
    """Everything the bytes of an export depend on (`fingerprint` covers tokenizer and generation config)."""
    versions = {package: version(package) for package in GRAPH_PACKAGES}
    rounded = hashlib.sha256(text.tobytes()).hexdigest() if text is not None and is_quantised(kind[1]) else None
    how = [*kind, config.exporter, config.provider, config.without_pass, config.verify, rounded]
    data = [fingerprint, *how, config.seed, versions]
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:32]
