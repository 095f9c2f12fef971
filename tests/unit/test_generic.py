"""Tables that are read off the modules: as the known ones, and refused where something is not as expected."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from models import tiny_text

import slimexport
from slimexport.architectures import architecture_of, generic, registry
from slimexport.cli import main
from slimexport.errors import BadInputError
from slimexport.testing import CHECKS, tiny_config, tiny_model, tiny_tokenizer

UNKNOWN = "jais2"  # a family that loads from transformers; that it has a file is forgotten here


@pytest.fixture(autouse=True)
def forgotten(monkeypatch: pytest.MonkeyPatch) -> None:
    known = {name: registry.get(name) for name in registry.names() if name != UNKNOWN}
    monkeypatch.setattr(registry, "_entries", known)


@pytest.mark.parametrize("family", ["llama", "qwen3", "granite", "phi", "stablelm", "exaone4"])
def test_a_guess_is_the_table_that_was_written(family: str) -> None:
    config = tiny_config(family)
    written, guessed = registry.get(family), generic.generic_family(config, "tiny")
    by_name = {weight.name: weight.axes for weight in written.block_weights}
    found = {weight.name: weight.axes for weight in guessed.block_weights}
    assert found.items() <= by_name.items()
    assert guessed.attention_output == written.attention_output
    assert guessed.ffn_output == written.ffn_output
    assert set(guessed.ffn_factors) == set(written.ffn_factors)
    assert (guessed.decoder, guessed.blocks) == (written.decoder, written.blocks)


@pytest.mark.parametrize(
    ("family", "reason"),
    [
        ("olmo2", "self_attn.q_norm.weight"),  # over all heads together
        ("gpt2", "intermediate_size"),
        ("qwen3_moe", "mlp.experts"),
        ("phi3", "qkv_proj"),
        ("falcon", "intermediate_size"),
    ],
)
def test_what_is_not_as_expected_is_refused(family: str, reason: str) -> None:
    with pytest.raises(BadInputError, match=rf"cannot be pruned generically: .*{reason}"):
        generic.generic_family(tiny_config(family), "tiny")


def test_a_guess_that_fails_a_check_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    def check(*_: object) -> None:
        raise AssertionError("heads are not what they seem")

    monkeypatch.setitem(CHECKS, "shrunk equals masked", check)
    with pytest.raises(BadInputError, match="does not pass the check 'shrunk equals masked': heads are not"):
        generic.generic_family(tiny_config(UNKNOWN), "tiny")


def test_only_where_it_is_asked_for(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tiny_config(UNKNOWN)
    tiny_model(config).save_pretrained(str(tmp_path / "dense"))
    tiny_tokenizer().save_pretrained(str(tmp_path / "dense"))
    with pytest.raises(BadInputError, match="--architecture auto tries others"):
        architecture_of(config, "tiny")
    text = tiny_text(tmp_path / "text.txt", 1500, seed=1)
    arguments = ["prune", str(tmp_path / "dense"), "-o", str(tmp_path / "out"), "--ratio", "0.3", "--round-to", "8"]
    arguments += ["--calibration", str(text), "--calibration-tokens", "512", "--sequence-length", "32", "--fast"]
    with registry.including("nothing", registry.get("llama")):  # what is found in here is forgotten again
        with pytest.raises(SystemExit) as done:
            main([*arguments, "--architecture", "auto", "--quiet"])
        assert done.value.code == 0, capsys.readouterr().err
        again, _ = slimexport.load(tmp_path / "out" / "checkpoint")
    with registry.including("nothing", registry.get("llama")):
        other, _ = slimexport.load(tmp_path / "out" / "checkpoint")  # the checkpoint says how it was made
    ids = torch.arange(3, 40)[None]
    with torch.no_grad():
        assert torch.equal(again(ids).logits, other(ids).logits)
    assert sum(p.numel() for p in again.parameters()) < sum(p.numel() for p in tiny_model(config).parameters())
