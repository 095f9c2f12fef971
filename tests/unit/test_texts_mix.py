"""Calibration texts of several kinds: which parts, how many windows of each, and what is refused in which words."""

from __future__ import annotations

import json
import os
import re
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from models import VOCAB, tiny_model, tiny_text, tiny_tokenizer

from slimexport.calibration import calibrate, check_overlap, evaluation_ids
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.texts import Text, chat, distance, mix, news, prompts, questions, sources, standard_library, wikipedia
from slimexport.texts.windows import grid, pack

OURS = {"wikipedia": 1000, "news": 300, "code": 500, "questions": 40}  # words
REFUSED = "slimexport-no-such-package"

WITH_CHAT = "mix:wikipedia=0.4,news=0.15,code=0.15,questions=0.1,chat=0.2"


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return tiny_tokenizer()


@pytest.fixture(scope="module")
def model() -> Any:
    return tiny_model()


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> None:
    """Texts of ours that the tiny tokenizer knows: each starts at another word."""
    read = sources.read

    def known(spec: str, part: Any, tokens: int) -> Text:
        if spec not in sources.READ:
            return read(spec, part, tokens)
        start = 50 * sources.READ.index(spec) + (25 if part == "evaluation" else 0)
        words = " ".join(f"w{start + i % 25}" for i in range(OURS[spec]))
        return Text(f"the {spec}", (words,), license=f"licence of {spec}")

    monkeypatch.setattr(sources, "read", known)


def config(**values: Any) -> RunConfig:
    return RunConfig(**{"model": "m", "sequence_length": 8, "calibration_tokens": 160, **values})


def refused(stage: Any, *arguments: Any) -> str:
    with pytest.raises(BadInputError) as caught:
        stage(*arguments)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def counts(name: str) -> dict[str, int]:
    """'a mix: 50% news, 50% code' -> shares."""
    return {part: int(share) for share, part in re.findall(r"(\d+)% (\S+?)(?:,|$)", name)}


# ---------------------------------------------------------------------------------------------------- specifications


def test_specifications() -> None:
    assert mix.parse("mix:wikipedia=1,code=3") == {"wikipedia": 0.25, "code": 0.75}
    assert mix.parse("mix: news = .5 , a=b.txt=0.5,dataset:x:y=0,chat=1e0") == {
        "news": 0.25,
        "a=b.txt": 0.25,
        "chat": 0.5,
    }
    assert mix.parse("default") == pytest.approx(mix.DEFAULT)
    assert sum(mix.DEFAULT.values()) == pytest.approx(1)
    assert set(mix.DEFAULT) <= set(sources.NAMES)
    assert [mix.is_mix(s) for s in ("default", "mix:a", "news", "self", "mix.txt")] == [True, True, False, False, False]


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("mix:", "'' in 'mix:' is not of the form PART=WEIGHT: mix:PART=WEIGHT,PART=WEIGHT,... is needed."),
        ("mix:news", "'news' in 'mix:news' is not of the form PART=WEIGHT"),
        ("mix:=1", "'=1' in 'mix:=1' is not of the form PART=WEIGHT"),
        ("mix:news=1,", "'' in 'mix:news=1,' is not of the form PART=WEIGHT"),
        ("mix:new=1", "'new' in 'mix:new=1' is no part: wikipedia, news, code, questions, chat, self, a .txt or .jsonl "
                      "file or dataset:NAME is needed. Did you mean 'news'?"),
        ("mix:default=1", "'default' in 'mix:default=1' is no part"),
        ("mix:news=-0.1,code=1", "The weight of news is '-0.1': a number that is not negative is needed."),
        ("mix:news=x", "The weight of news is 'x'"),
        ("mix:news=", "The weight of news is ''"),
        ("mix:news=nan", "The weight of news is 'nan'"),
        ("mix:news=inf,code=1", "The weight of news is 'inf'"),
        ("mix:news=0,code=0", "The weights in 'mix:news=0,code=0' sum to zero: one part at least needs a weight above "
                              "zero."),
        ("mix:news=1,news=2", "news is in 'mix:news=1,news=2' twice: give it one weight."),
    ],
)  # fmt: skip
def test_bad_specifications(tokenizer: Any, spec: str, says: str) -> None:
    assert says in refused(calibrate, config(calibration=spec), tokenizer)


def test_files_of_a_mix(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    spec = "mix:a.txt=0.3,news=0.6,dataset:x=0.1"
    assert mix.files(spec) == (Path("a.txt"),)
    assert mix.absolute(spec) == f"mix:{tmp_path / 'a.txt'}=0.3,news=0.6,dataset:x=0.1"
    assert mix.absolute("default") == "default"
    specs = ("self", "mix:self=1,chat=1", "mix:self=1,code=0", "default", "code", "a.txt")
    assert [mix.written(s) for s in specs] == [True, True, True, False, False, False]


# ------------------------------------------------------------------------------------------------- weights to counts


def test_largest_remainder() -> None:
    free = [10**9] * 5
    assert mix.apportion([0.4, 0.15, 0.15, 0.1, 0.2], free, 64) == [26, 10, 9, 6, 13]
    assert mix.apportion([0.5, 0.5], free[:2], 3) == [2, 1], "ties to the first"
    assert mix.apportion([0.98, 0.01, 0.01], free[:3], 10) == [8, 1, 1], "one at least"
    assert mix.apportion([0.98, 0.01, 0.01], [2, 9, 9], 3) == [1, 1, 1]
    assert mix.apportion([0.98, 0.01, 0.01], [2, 9, 9], 10) == [2, 4, 4], "what is above a limit is handed on"


@given(st.data())
def test_counts_fill_the_calibration(data: Any) -> None:
    n = data.draw(st.integers(1, 6))
    weights = data.draw(st.lists(st.floats(1e-6, 1), min_size=n, max_size=n))
    limits = data.draw(st.lists(st.integers(1, 40), min_size=n, max_size=n))
    count = data.draw(st.integers(n, sum(limits)))
    found = mix.apportion(weights, limits, count)
    assert sum(found) == count
    assert all(1 <= seats <= limit for seats, limit in zip(found, limits, strict=True))


def test_parts_take_turns() -> None:
    assert mix.interleave([4, 2, 1]) == [(0, 0), (1, 0), (0, 1), (2, 0), (0, 2), (1, 1), (0, 3)]
    order = mix.interleave([26, 10, 9, 6, 13])
    assert sorted(order) == [(part, i) for part, n in enumerate([26, 10, 9, 6, 13]) for i in range(n)]
    assert Counter(part for part, _ in order[:32])[0] == 13


# --------------------------------------------------------------------------------------------------------- the windows


@pytest.mark.usefixtures("ours")
def test_a_mix_of_ours_and_a_file(tmp_path: Path, tokenizer: Any) -> None:
    file = tiny_text(tmp_path / "a.txt", 200, seed=1)
    asked = config(calibration=f"mix:wikipedia=0.5,code=0.2,{file}=0.3")
    found = calibrate(asked, tokenizer)
    assert (found.input_ids.shape, found.input_ids.dtype) == ((20, 8), torch.int64)
    assert counts(found.source.name) == {"wikipedia": 50, "code": 20, str(file): 30}
    assert found.source.license == "wikipedia: licence of wikipedia; code: licence of code"
    assert (found.source.tokens, found.source.note) == (160, None)
    pieces = {
        name: grid(pack(sources.read(name, "calibration", 0), tokenizer), 8)
        for name in ("wikipedia", "code", str(file))
    }
    rows = [next(n for n, w in pieces.items() if (w == row).all(1).any()) for row in found.input_ids]
    assert Counter(rows) == {"wikipedia": 10, "code": 4, str(file): 6}
    assert len(set(rows[:4])) == 3, "interleaved"


@pytest.mark.usefixtures("ours")
def test_the_seed_decides_and_the_digest_is_of_all_tokens(tokenizer: Any, model: Any) -> None:
    asked = config(calibration=WITH_CHAT)
    state = torch.random.get_rng_state()
    first, again = (calibrate(asked, tokenizer, model) for _ in range(2))
    assert torch.equal(torch.random.get_rng_state(), state), "the global generator is left alone"
    assert torch.equal(first.input_ids, again.input_ids)
    assert first.source == again.source
    other = calibrate(asked.model_copy(update={"seed": 1}), tokenizer, model)
    assert not torch.equal(first.input_ids, other.input_ids)
    assert first.source.sha256 != other.source.sha256
    assert counts(first.source.name) == {"wikipedia": 40, "news": 15, "code": 15, "questions": 10, "chat": 20}
    assert "chat: answers sampled from the dense model itself" in (first.source.note or "")


@pytest.mark.usefixtures("ours")
def test_without_the_model_only_its_own_sequences_are_missing(tokenizer: Any, model: Any) -> None:
    whole, read = (mix.mixed(WITH_CHAT, tokenizer, m, 20, 8, 0) for m in (model, None))
    assert [p for p in whole.parts if not p.written] == list(read.parts)
    rows = {tuple(row.tolist()) for row in whole.input_ids}
    assert {tuple(row.tolist()) for row in read.input_ids} <= rows
    assert len(read.input_ids) == 16
    assert read.notes == ("chat is not in it: the model was not there to write it",)
    with pytest.raises(ValueError, match="needs the model"):
        calibrate(config(calibration="mix:chat=1"), tokenizer)


@pytest.mark.usefixtures("ours")
def test_a_text_of_ours_that_is_short_hands_on_its_share(tokenizer: Any) -> None:
    found = mix.mixed("mix:questions=0.5,wikipedia=0.5", tokenizer, None, 20, 8, 0)
    assert [(p.name, p.tokens) for p in found.parts] == [("questions", 40), ("wikipedia", 120)]
    assert found.notes == ("questions is all of it, 5 sequences where its weight is 10",)
    message = refused(mix.mixed, "mix:questions=1", tokenizer, None, 20, 8, 0)
    assert message == (
        "The calibration text mix:questions=1 is too short: its parts hold 5 sequences of 8 tokens, needed are 20. "
        "Lower --calibration-tokens to 40, or add files of your own."
    )


@pytest.mark.usefixtures("ours")
def test_a_file_of_the_users_that_is_short_is_refused(tmp_path: Path, tokenizer: Any) -> None:
    file = tiny_text(tmp_path / "a.txt", 30, seed=1)
    message = refused(calibrate, config(calibration=f"mix:{file}=0.5,news=0.5"), tokenizer)
    assert "a.txt is too short for its weight: found 3 sequences of 8 tokens, need 10." in message
    message = refused(calibrate, config(calibration=f"mix:{tmp_path}/b.txt=0.1,news=0.9"), tokenizer)
    assert message.endswith("b.txt does not exist. Did you mean 'a.txt'?")


@pytest.mark.usefixtures("ours")
def test_fewer_sequences_than_parts_keep_the_heaviest(tokenizer: Any) -> None:
    found = mix.mixed("mix:news=1,code=2,wikipedia=3", tokenizer, None, 2, 8, 0)
    assert [p.name for p in found.parts] == ["wikipedia", "code"]
    assert found.notes == ("news left out: there are only 2 sequences",)


def test_what_is_not_here_is_left_out(tokenizer: Any, model: Any, ours: None, monkeypatch: pytest.MonkeyPatch) -> None:
    known = sources.read
    gone = {"news"}

    def read(spec: str, part: Any, tokens: int) -> Text:
        if spec in gone:
            raise BadInputError(f"{spec}: not installed here.")
        return known(spec, part, tokens)

    monkeypatch.setattr(sources, "read", read)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    found = mix.mixed(WITH_CHAT, tokenizer, model, 20, 8, 0)
    assert [(p.name, p.tokens // 8) for p in found.parts] == [("wikipedia", 12), ("code", 5), ("questions", 3)]
    assert found.notes == ("news left out: news: not installed here", "chat left out: the model has no chat template")
    gone.add("wikipedia")
    assert refused(mix.mixed, WITH_CHAT, tokenizer, model, 20, 8, 0) == (
        f"More than half of the calibration text {WITH_CHAT} is not here. wikipedia: wikipedia: not installed here; "
        "news: news: not installed here; chat: the model has no chat template."
    )


@pytest.mark.usefixtures("ours")
def test_single_names_and_what_is_held_out(tokenizer: Any, model: Any) -> None:
    alone = calibrate(config(calibration="code"), tokenizer)
    assert alone.source.name == "the code"
    held_out = evaluation_ids(config(eval_text="code", eval_tokens=64), tokenizer, alone.source)
    assert not set(held_out.input_ids.tolist()) & set(alone.input_ids.flatten().tolist())
    default = evaluation_ids(config(eval_tokens=64), tokenizer, None)
    assert torch.equal(
        default.input_ids, evaluation_ids(config(eval_text="wikipedia", eval_tokens=64), tokenizer, None).input_ids
    )
    check_overlap(calibrate(config(), tokenizer, model), default)
    for spec in ("chat", "self"):
        assert "a model cannot be judged by its own text" in refused(
            evaluation_ids, config(eval_text=spec), tokenizer, None
        )
        with pytest.raises(ValueError, match=f"needs the model for --calibration {spec}"):
            calibrate(config(calibration=spec), tokenizer)
    for spec in ("questions", "mix:news=1"):
        message = refused(evaluation_ids, config(eval_text=spec), tokenizer, None)
        assert message.startswith(f"--eval-text {spec}: one text is needed: a file, default, wikipedia, news or code")


@pytest.mark.usefixtures("ours")
def test_a_part_may_not_be_the_evaluation_text(tmp_path: Path, tokenizer: Any) -> None:
    file = tiny_text(tmp_path / "a.txt", 300, seed=1)
    (tmp_path / "b.txt").symlink_to(file)
    for evaluation in (file, tmp_path / "b.txt"):
        asked = config(calibration=f"mix:news=0.9,{file}=0.1", eval_text=str(evaluation))
        assert "is both the calibration and the evaluation text" in refused(calibrate, asked, tokenizer)


# ------------------------------------------------------------------------------------------------------ the model's own


@pytest.fixture
def said(tokenizer: Any, monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Prompts of different lengths in words that the tiny tokenizer knows; returns them as token ids."""
    monkeypatch.setattr(chat, "PROMPTS", tuple(" ".join(f"w{20 * i + k}" for k in range(3 + 2 * i)) for i in range(6)))
    return [chat._opening(tokenizer, prompt) for prompt in chat.PROMPTS]


def test_conversations_are_what_the_model_says(tokenizer: Any, said: list[list[int]]) -> None:
    """With logits scaled up sampling is greedy, so the cached road must give what full forward passes give."""
    model = tiny_model("mistral")
    model.lm_head.weight.data *= 1e4
    told: list[tuple[int, int]] = []
    found = chat.sample(model, tokenizer, 6, 128, 0, lambda done, total, text: told.append((done, total)))
    assert (found.shape, found.dtype) == ((6, 128), torch.int64)
    assert told[-1] == (768, 768)
    assert told == sorted(told)
    rows = found.view(3, 256)
    with torch.no_grad():
        greedy = model(input_ids=rows).logits.argmax(-1)
    begun = []
    for row, answer in zip(rows, greedy, strict=True):
        opening = next(o for o in said if row[: len(o)].tolist() == o)
        begun.append(opening)
        end = next((i for i in range(len(opening), 256) if row[i] == tokenizer.eos_token_id), 255)
        assert torch.equal(answer[len(opening) - 1 : end], row[len(opening) : end + 1])
    assert len({len(opening) for opening in begun}) == 3, "rows with openings of different lengths"


def test_an_answer_that_ends_is_followed_by_the_next_conversation(tokenizer: Any, said: list[list[int]]) -> None:
    model = tiny_model()
    model.generation_config.eos_token_id = list(range(VOCAB))  # every token ends the answer
    row = chat.sample(model, tokenizer, 1, 60, 3).flatten().tolist()
    order = torch.randperm(6, generator=torch.Generator().manual_seed(3)).tolist()
    at = 0
    for i in [*order, *order]:
        assert row[at : at + len(said[i])] == said[i][: max(0, len(row) - at)]
        at += len(said[i]) + 1
    assert at > len(row)


def test_a_template_that_fails_is_said(tokenizer: Any, model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer, "chat_template", "{{ raise_exception('no system turn') }}")
    assert "the chat template fails: no system turn" in refused(chat.sample, model, tokenizer, 1, 8, 0)
    monkeypatch.setattr(tokenizer, "chat_template", None)
    message = refused(calibrate, config(calibration="chat"), tokenizer, model)
    assert message == "chat: the model has no chat template; use --calibration FILE."


# ------------------------------------------------------------------------------------------------------ what is at hand

needs_gensim = pytest.mark.skipif(wikipedia.wheel_file(news.FILE) is None, reason="gensim is not installed")


def grams(text: str, size: int) -> set[tuple[str, ...]]:
    words = re.findall(r"\w+", text.lower())
    return {tuple(words[i : i + size]) for i in range(len(words) - size + 1)}


@needs_gensim
def test_the_news_shares_nothing_with_the_benchmark_nor_its_parts_with_each_other() -> None:
    calibration, evaluation = (news.news_text(part) for part in ("calibration", "evaluation"))
    assert len(calibration.documents) + len(evaluation.documents) == 293
    assert not set(calibration.documents) & set(evaluation.documents)
    benchmark = wikipedia.wheel_file(r"lee\.cor")
    assert benchmark is not None
    lee = grams(benchmark.read_text(encoding="latin-1"), 8)
    assert len(lee) > 4000
    for text in (calibration, evaluation):
        assert not grams(text.joined, 8) & lee


def test_missing_gensim_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(wikipedia, "PACKAGE", REFUSED)
    assert "pip install --no-deps gensim==4.4.0" in refused(news.news_text, "calibration")


def test_code_is_of_this_python(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calibration, evaluation = (standard_library.code_text(part) for part in ("calibration", "evaluation"))
    assert len(calibration.documents) + len(evaluation.documents) == len(standard_library.MODULES)
    assert len(set(standard_library.MODULES)) == len(standard_library.MODULES)
    assert "def heappush(" in calibration.joined
    assert not set(calibration.documents) & set(evaluation.documents)
    assert calibration.license == "PSF-2.0 (Python standard library)"
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path))
    assert "are not in" in refused(standard_library.code_text, "calibration")


def test_questions_are_well_formed_and_laid_out_evenly() -> None:
    rows = [line.split("|") for line in questions._ITEMS.strip().split("\n")]
    assert len(rows) == 102
    for row in rows:
        assert len(row) == 5, row
        assert len({choice.lower() for choice in row[1:]}) == 4, row
    assert len({row[0] for row in rows}) == len(rows)
    text = questions.questions_text().joined
    letters = Counter(re.findall(r"^Answer: ([A-D])\. ", text, re.MULTILINE))
    numbers = Counter(re.findall(r"^A: \(([1-4])\) ", text, re.MULTILINE))
    for found in (letters, numbers):
        assert sum(found.values()) == 34
        assert min(found.values()) >= 8


def test_our_questions_and_prompts_are_not_those_of_the_benchmark() -> None:
    data = Path(os.environ.get("SLIMEXPORT_DATA", Path(__file__).parents[3] / "shared" / "data"))
    file = data / "arc" / "arc_easy_validation.jsonl"
    if not file.is_file():
        pytest.skip("no shared/data")
    rows = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()]
    benchmark = set().union(*(grams(" ".join((row["question"], *row["choices"]["text"])), 7) for row in rows))
    ours = grams(questions.questions_text().joined, 7) | grams("\n".join(prompts.PROMPTS), 7)
    assert not ours & benchmark
    assert len(set(prompts.PROMPTS)) == len(prompts.PROMPTS) == 64


# ------------------------------------------------------------------------------------------------------------- distance


def draws(weights: torch.Tensor, count: int, seed: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.multinomial(weights.double(), count, replacement=True, generator=generator)


def zipf(shift: int = 0) -> torch.Tensor:
    return 1 / torch.arange(1, 1001).roll(shift)


def test_divergence_is_symmetric_and_zero_for_the_same() -> None:
    a, b = draws(zipf(), 4000, 0), draws(zipf(3), 3000, 1)
    assert distance.divergence(a, a.view(40, 100)) == 0
    assert distance.divergence(a, b) == distance.divergence(b, a) > 0
    assert distance.divergence(torch.tensor([1, 2, 1]), torch.tensor([3, 4])) == pytest.approx(1), "one bit: disjoint"


def test_near_is_less_than_far() -> None:
    calibration = draws(zipf(), 32768, 0).view(64, 512)
    same, other = draws(zipf(), 16384, 1), draws(zipf(40), 16384, 2)
    between = torch.cat([same[:8192], other[:8192]])[torch.randperm(16384, generator=torch.Generator().manual_seed(0))]
    found = [distance.distance(calibration, text) for text in (same, between, other)]
    assert found[0] < 0.005, "the noise of a sample is taken off"
    assert found[0] < found[1] < found[2]
    assert found == [distance.distance(calibration, text) for text in (same, between, other)]
    assert distance.distance(calibration, calibration.flatten()) < 0.005


def test_far_texts_are_warned_of() -> None:
    calibration, far = draws(zipf(), 32768, 0).view(64, 512), draws(zipf(400), 16384, 2)
    message = distance.warn_if_far(calibration, far)
    assert message is not None
    assert message.startswith("The evaluation text is of another kind than the calibration text (token frequencies 0.")
    assert "\n" not in message
    assert distance.warn_if_far(calibration, draws(zipf(), 16384, 1)) is None
    assert distance.warn_if_far(calibration, far[:500]) is None, "too short to say"
    with pytest.raises(ValueError, match="two pieces of 64 tokens"):
        distance.distance(calibration[0, :100], far)


@needs_gensim
def test_kinds_of_text_are_told_apart() -> None:
    """Bytes stand in for a tokenizer: news is near news, and far from code."""

    def ids(text: str) -> torch.Tensor:
        return torch.tensor(list(text.encode()), dtype=torch.int64)

    parts = {name: [ids(sources.read(name, part, 0).joined)[:40_000] for part in ("calibration", "evaluation")]
             for name in ("news", "code")}  # fmt: skip
    near, far = (distance.distance(parts["news"][0], parts[name][1]) for name in ("news", "code"))
    assert near < 0.01 < 0.1 < far
