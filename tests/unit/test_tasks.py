"""Tasks of lm-eval on decoders of the runtime, beside lm-eval's own model of transformers."""

from __future__ import annotations

import json
import math
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from models import tiny_directory
from transformers import AutoTokenizer

from slimexport.artifacts import VerificationReport
from slimexport.errors import BadInputError
from slimexport.gates.decide import evaluate, parse
from slimexport.runtime import CheckpointDecoder
from slimexport.tasks import figures, named, score

pytest.importorskip("lm_eval")

QUESTIONS = [
    {
        "id": f"q{number}",
        "question": f"Which number is {word}?",
        "choices": {"text": ["one", "two of them", "three", str(number)], "label": ["A", "B", "C", "D"]},
        "answerKey": "ABCD"[number % 4],
    }
    for number, word in enumerate(["small", "large", "even", "odd", "prime", "a square", "negative", "of no use"])
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny_directory(tmp_path_factory.mktemp("tasks") / "model")


@pytest.fixture
def questions(tmp_path: Path) -> Path:
    path = tmp_path / "questions.jsonl"
    path.write_text("".join(json.dumps(question) + "\n" for question in QUESTIONS))
    return path


def requests(*pairs: Any) -> list[Any]:
    return [SimpleNamespace(args=pair) for pair in pairs]


def harnesses(model: Path, **options: Any) -> tuple[Any, Any]:
    """Ours, and lm-eval's, of the same model."""
    from lm_eval.models.huggingface import HFLM

    from slimexport.tasks.harness import DecoderLM

    decoder = CheckpointDecoder(model)
    tokenizer = AutoTokenizer.from_pretrained(model)
    return DecoderLM(decoder, tokenizer, **options), HFLM(pretrained=decoder.model, tokenizer=tokenizer, batch_size=1)


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_log_likelihoods_are_those_of_lm_eval(model: Path, batch: int) -> None:
    ours, theirs = harnesses(model, batch=batch)
    asked = requests(
        ("Which number is small?\nAnswer:", " one"), ("Which number is small?\nAnswer:", " two of them and more"),
        ("a", " b"), ("", "from nothing"), ("ends with a space ", "word"), ("a", " b"),
        ("a longer context than the others have, to be padded beside", " it"),
    )  # fmt: skip
    for own, other in zip(ours.loglikelihood(asked), theirs.loglikelihood(asked), strict=True):
        assert own[0] == pytest.approx(other[0], abs=1e-4)
        assert own[1] == other[1]
    texts = requests(("A whole text, of some words. " * 20,), ("short",))
    assert ours.loglikelihood_rolling(texts) == pytest.approx(theirs.loglikelihood_rolling(texts), rel=1e-5)


def test_generated_text_is_that_of_lm_eval(model: Path) -> None:
    ours, theirs = harnesses(model)
    wanted = {"until": ["\n\n", "zzz"], "max_gen_toks": 12, "do_sample": False}
    asked = requests(("Once upon a time", wanted), ("The number", wanted))
    assert ours.generate_until(asked) == theirs.generate_until(asked)
    with pytest.raises(ValueError, match="sample"):
        ours.generate_until(requests(("a", {"do_sample": True, "temperature": 0.7})))


def test_an_answer_may_be_longer_than_the_room(model: Path) -> None:
    """Half of it at most is taken from the prompt, whose end counts."""
    ours, _ = harnesses(model)
    room = ours.decoder.max_positions
    assert room is not None
    seen: list[tuple[list[int], int]] = []
    ours._generated = lambda prompt, until, most: seen.append((prompt, most)) or ""
    words = " ".join(f"word {n}" for n in range(3 * room))
    for most in (room // 4, room - 1, room, 16 * room):
        ours.generate_until(requests((words, {"max_gen_toks": most}), ("short", {"max_gen_toks": most})))
    whole, short = ours.tok_encode(words), ours.tok_encode("short")
    for (prompt, most), wanted in zip(seen[::2], (room // 4, room // 2, room // 2, room // 2), strict=True):
        assert prompt == whole[-(room - wanted) :]
        assert most == wanted
    assert [prompt for prompt, _ in seen[1::2]] == [short] * 4
    assert [most for _, most in seen[1::2]] == [room // 4, *[room - max(1, len(short))] * 3]


def test_a_stop_string_cuts_the_text(model: Path) -> None:
    ours, _ = harnesses(model)
    whole = ours.generate_until(requests(("Once upon a time", {"until": [], "max_gen_toks": 12})))[0]
    stop = whole[len(whole) // 2 : len(whole) // 2 + 2]
    cut = ours.generate_until(requests(("Once upon a time", {"until": [stop], "max_gen_toks": 12})))[0]
    assert cut == whole[: whole.index(stop)]


def test_a_context_that_is_too_long_loses_its_beginning(model: Path) -> None:
    ours, _ = harnesses(model)
    ours.longest = 16
    long, short = "x " * 200 + "the end", "the end"
    assert math.isfinite(ours.loglikelihood(requests((long, " of it")))[0][0])
    assert ours.loglikelihood(requests((short, " of it")))[0][0] < 0


def test_a_task_with_questions_of_a_file(model: Path, questions: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    task = named.parse(f"arc_easy={questions}")
    seen: list[tuple[int, int]] = []
    made = score.ask(CheckpointDecoder(model), tokenizer, task, progress=lambda done, total: seen.append((done, total)))
    assert seen[-1] == (32, 32)
    assert made.metrics["acc"] == pytest.approx(np.mean(made.questions["acc"]))
    assert len(made.questions["acc"]) == len(QUESTIONS)
    for question, answer, right in zip(QUESTIONS, made.answers, made.questions["acc"], strict=True):
        best = int(np.argmax([each[0] for each in answer]))
        assert right == float("ABCD"[best] == question["answerKey"])
    few = score.ask(CheckpointDecoder(model), tokenizer, task, limit=3)
    assert few.questions["acc"] == made.questions["acc"][:3]
    assert score.differing(made, made, "acc") == []


def scores(task: str, values: list[float], best: float = 0.5) -> score.Scores:
    answers = tuple([[-1.0, False], [-1.0 - best, False]] for _ in values)
    return score.Scores(task, {"acc": float(np.mean(values))}, {"acc": tuple(values)}, answers)


def test_figures_are_paired_and_say_where_torch_differs() -> None:
    own, dense = scores("t", [1, 0, 1, 0] * 25), scores("t", [1, 1, 1, 0] * 25)
    torch = scores("t", [0, 0, 1, 0] + [1, 0, 1, 0] * 24, best=0.0001)
    accuracy, agreement = figures.task_figures(own, dense, torch)
    assert (accuracy.name, accuracy.shrunk, accuracy.baseline) == ("task.t.acc", 0.5, 0.75)
    difference = np.array([0, -1, 0, 0] * 25)
    assert f"with a standard error of {difference.std(ddof=1) / 10:.4f}" in str(accuracy.note)
    assert accuracy.ratio_low is not None
    assert accuracy.ratio_low < 2 / 3 < accuracy.ratio_high  # type: ignore[operator]
    assert (agreement.name, agreement.shrunk) == ("task.t.torch_agreement", 0.99)
    assert "question 0 (best choice ahead by: graph 0.5000, torch 0.0001 nats)" in str(agreement.note)


def test_a_metric_that_is_no_mean_of_its_questions_has_no_interval(
    model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """lm-eval gives log-likelihoods for the questions of a perplexity."""
    import lm_eval

    def evaluate_(*_: Any, **__: Any) -> dict[str, Any]:
        samples = [{"doc_id": i, "perplexity": -3.2 + 0.1 * i, "acc": float(i % 2), "filtered_resps": [[-1.0]]}
                   for i in range(4)]  # fmt: skip
        return {
            "results": {"arc_easy": {"perplexity,none": 21.1, "acc,none": 0.5}},
            "samples": {"arc_easy": samples},
            "higher_is_better": {"arc_easy": {"perplexity": False, "acc": True}},
        }

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_)
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = score.ask(CheckpointDecoder(model), tokenizer, named.parse(f"arc_easy={questions}"))
    assert made.metrics == {"perplexity": 21.1, "acc": 0.5}
    assert made.questions == {"acc": (0.0, 1.0, 0.0, 1.0)}
    found = {figure.name: figure for figure in figures.task_figures(made, made, None)}
    assert found["task.arc_easy.perplexity"].better == "lower"
    assert found["task.arc_easy.acc"].better == "higher"
    report = VerificationReport(tuple(found.values()), tasks={"arc_easy": figures.record(made, made, None)})
    (result,) = evaluate((parse("task.arc_easy.perplexity<=20"),), report)
    assert result.outcome == "failed"


def test_each_way_to_take_an_answer_out_of_the_text_is_a_figure(
    model: Path, questions: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As gsm8k has two, and then no figure of none."""
    import lm_eval

    results = {"exact_match,strict-match": 0.25, "exact_match_stderr,strict-match": 0.2,
               "exact_match,flexible-extract": 0.5, "alias": "arc_easy"}  # fmt: skip

    def evaluate_(*_: Any, **__: Any) -> dict[str, Any]:
        samples = [{"doc_id": i, "filter": name, "exact_match": float(i < right), "filtered_resps": [f"{name} {i}"]}
                   for name, right in (("strict-match", 1), ("flexible-extract", 2)) for i in range(4)]  # fmt: skip
        return {"results": {"arc_easy": results}, "samples": {"arc_easy": samples},
                "higher_is_better": {"arc_easy": {"exact_match": True}}}  # fmt: skip

    monkeypatch.setattr(lm_eval, "simple_evaluate", evaluate_)
    tokenizer = AutoTokenizer.from_pretrained(model)
    made = score.ask(CheckpointDecoder(model), tokenizer, named.parse(f"arc_easy={questions}"))
    assert made.metrics == {"exact_match_strict_match": 0.25, "exact_match_flexible_extract": 0.5}
    assert made.questions["exact_match_strict_match"] == (1.0, 0.0, 0.0, 0.0)
    assert made.questions["exact_match_flexible_extract"] == (1.0, 1.0, 0.0, 0.0)
    assert len(made.answers) == 4
    results.clear()
    with pytest.raises(BadInputError, match="gives no figure"):
        score.ask(CheckpointDecoder(model), tokenizer, named.parse(f"arc_easy={questions}"))


def test_twenty_questions_prove_nothing() -> None:
    def outcome(count: int) -> str:
        own, dense = scores("t", [1, 0, 1, 0] * count), scores("t", [1, 1, 0, 0] * count)
        report = VerificationReport(
            figures.task_figures(own, dense, None), tasks={"t": figures.record(own, dense, None)}
        )
        (result,) = evaluate((parse("ratio(task.t.acc)>=0.9"),), report)
        return result.outcome

    assert outcome(5) == "undecided"
    assert outcome(500) == "passed"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda q: q.pop("choices"), "choices"),
        (lambda q: q.pop("answerKey"), "answerKey"),
    ],
)
def test_questions_that_lack_a_field(model: Path, tmp_path: Path, change: Any, words: str) -> None:
    path = tmp_path / "bad.jsonl"
    bad = [dict(question) for question in QUESTIONS]
    for question in bad:
        change(question)
    path.write_text("".join(json.dumps(question) + "\n" for question in bad))
    with pytest.raises(BadInputError) as caught:
        score.ask(CheckpointDecoder(model), AutoTokenizer.from_pretrained(model), named.parse(f"arc_easy={path}"))
    assert str(path) in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("arc_eazy", "no task 'arc_eazy'. Did you mean 'arc_easy'?"),
        ("arc_easy=/no/such.jsonl", "are no file"),
        (f"arc_easy={__file__}", "Questions are read from .jsonl, .json"),
    ],
)
def test_unknown_tasks_and_files(spec: str, words: str) -> None:
    with pytest.raises(BadInputError, match=words.replace("?", "\\?")):
        named.check((spec,))
    for bad in ("", "a b", "arc_easy=", "=x"):
        with pytest.raises(ValueError, match="is not a task"):
            named.parse(bad)
