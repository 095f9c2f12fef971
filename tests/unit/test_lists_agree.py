"""Names that stand in several places are the same ones in all of them."""

from __future__ import annotations

import typing

from slimexport.artifacts import is_quantised
from slimexport.bench.settings import Settings
from slimexport.config import RunConfig
from slimexport.providers import PROVIDERS
from slimexport.runtime import signature
from slimexport.targets import base, passes
from slimexport.targets import registry as targets
from slimexport.targets.passes import last_logits
from slimexport.targets.quantise import SCHEMES
from slimexport.verification.latency import BITS
from slimexport.verification.numerics import TOLERANCES


def choices(name: str) -> tuple[str, ...]:
    """Of a field of RunConfig, which may hold several."""
    kind = RunConfig.model_fields[name].annotation
    return typing.get_args(typing.get_args(kind)[0] if typing.get_origin(kind) is tuple else kind)


def test_precisions() -> None:
    assert choices("precision") == base.PRECISIONS
    assert set(TOLERANCES) == set(BITS) == set(base.PRECISIONS)
    assert set(SCHEMES) == {name for name in base.PRECISIONS if is_quantised(name)}


def test_providers_exporters_and_passes() -> None:
    assert choices("provider") == tuple(PROVIDERS)
    assert choices("exporter") == base.BUILDERS
    assert choices("without_pass") == tuple(passes.PASSES)
    assert Settings().provider in PROVIDERS
    assert last_logits.ALL_LOGITS == signature.ALL_LOGITS


def test_targets() -> None:
    said = str(RunConfig.model_fields["target"].description)
    assert sorted(said.rstrip(".").split(": ")[1].split(", ")) == targets.names()
