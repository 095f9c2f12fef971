"""What recovery minimises, which text comes next, and that a training can be stopped anywhere and never ends worse."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch.nn import functional

from slimexport.architectures import architecture_of
from slimexport.artifacts import HeldOut, TextPart
from slimexport.config import RunConfig
from slimexport.errors import BadInputError
from slimexport.progress import Progress
from slimexport.pruning.states import CPU
from slimexport.recovery import blockwise as blockwise_training
from slimexport.recovery import losses, memory, optimisers, training
from slimexport.recovery.blockwise import BlockwiseTraining
from slimexport.recovery.budget import Budget
from slimexport.recovery.chat import ASKED, Chat, warning
from slimexport.recovery.domains import EPOCHS, Domain, OutOfTextError, Turns, read_domains
from slimexport.recovery.methods import registry as methods
from slimexport.recovery.state import TrainingState
from slimexport.recovery.training import Recipe, Trained, Training
from slimexport.testing.models import VOCAB, tiny_config, tiny_model, tiny_tokenizer
from slimexport.texts import chat as chat_text

# ------------------------------------------------------------------------------------------------------------- budget


@pytest.mark.parametrize(
    ("text", "amount", "unit"),
    [("20m", 1200, "seconds"), ("1h30m", 5400, "seconds"), ("90s", 90, "seconds"), ("0.5h", 1800, "seconds"),
     ("20 min", 1200, "seconds"), ("200 steps", 200, "steps"), ("500k tokens", 500_000, "tokens"),
     ("1.5Mtokens", 1_500_000, "tokens")],
)  # fmt: skip
def test_budgets_are_read_as_people_write_them(text: str, amount: float, unit: str) -> None:
    assert Budget.parse(text) == Budget(amount, unit)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["", "20", "0s", "-5m", "20 parsecs", "m", "0 steps", "1e3 steps"])
def test_what_is_no_budget_is_said(text: str) -> None:
    with pytest.raises(ValueError, match="is no budget"):
        Budget.parse(text)


def test_a_budget_holds_whole_steps() -> None:
    assert Budget.parse("1000 tokens").steps(300) == 3
    assert Budget.parse("100 tokens").steps(300) == 0
    assert Budget.parse("7 steps").steps(300) == 7
    assert Budget.parse("5m").steps(300) is None


# ------------------------------------------------------------------------------------------------------------- losses


def logits(rows: int = 300, vocabulary: int = 7) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(3)
    own, other = (torch.randn(rows, vocabulary, generator=generator, dtype=torch.float64) * 2 for _ in range(2))
    return own, other, torch.randint(vocabulary, (rows,), generator=generator)


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_the_loss_is_what_it_says_and_its_gradient_that_of_finite_differences(share: float, temperature: float) -> None:
    own, other, targets = logits()
    q = functional.log_softmax(own / temperature, -1)
    p = functional.softmax(other / temperature, -1)
    expected = (1 - share) * temperature**2 * (p * (p.log() - q)).sum(-1).mean()
    expected += share * functional.cross_entropy(own, targets)
    given = {"text_share": share, "temperature": temperature}
    assert float(losses.distillation(own, other, targets, **given)) == pytest.approx(float(expected), rel=1e-12)
    few = own[:5].clone().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda x: losses.distillation(x, other[:5], targets[:5], **given), (few,), eps=1e-6, atol=1e-8
    )


def test_the_gradient_reaches_what_makes_the_logits_scaled_by_what_is_above() -> None:
    own, other, targets = logits(20)
    x = own.clone().requires_grad_()
    (3 * losses.distillation(2 * x, other, targets)).backward()
    y = own.clone().requires_grad_()
    reference = functional.kl_div(
        functional.log_softmax(2 * y, -1), functional.log_softmax(other, -1), reduction="batchmean", log_target=True
    )
    (3 * reference).backward()
    assert x.grad is not None
    assert y.grad is not None
    torch.testing.assert_close(x.grad, y.grad, rtol=1e-12, atol=1e-14)


def test_the_same_distribution_has_no_divergence_and_no_gradient() -> None:
    own, _, targets = logits(20)
    x = own.clone().requires_grad_()
    loss = losses.distillation(x, own + 1.5, targets)  # a constant changes no distribution
    loss.backward()
    assert float(loss.detach()) == pytest.approx(0, abs=1e-12)
    assert x.grad is not None
    assert float(x.grad.abs().max()) < 1e-12
    assert losses.distances(own, own, targets)[0] == 0.0


@pytest.mark.parametrize("share", [0.0, 0.3, 1.0])
def test_a_token_after_which_nothing_comes_counts_for_nothing(share: float) -> None:
    own, other, _ = logits(300)
    ids = torch.randint(7, (3, 100), generator=torch.Generator().manual_seed(4))
    targets = losses.targets_of(ids)
    assert targets.tolist() == [t for row in ids.tolist() for t in (*row[1:], losses.NOTHING)]
    kept = targets != losses.NOTHING

    def gradient(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        x = own.clone().requires_grad_()
        loss = losses.distillation(x[rows], other[rows], targets[rows], text_share=share)
        loss.backward()
        assert x.grad is not None
        return loss.detach(), x.grad

    torch.testing.assert_close(gradient(torch.ones_like(kept)), gradient(kept), rtol=1e-12, atol=1e-15)
    divergence, nll = losses.distances(own, other, targets)
    assert (1 - share) * divergence + share * nll == pytest.approx(297 * float(gradient(kept)[0]), rel=1e-5)


def test_hidden_states_count_by_their_own_size() -> None:
    """A token a thousand times as large as the others counts as they do."""
    torch.manual_seed(0)
    a, b = 100 * torch.randn(2, 3, 4, dtype=torch.float32), 100 * torch.randn(2, 3, 4)
    a[0, 0], b[0, 0] = 1000 * a[0, 0], 1000 * b[0, 0]
    expected = (((a - b).square().sum(-1) / b.square().sum(-1)).mean() + 0.25) / 2
    assert float(losses.hidden_states([a, 0.5 * b], [b, b])) == pytest.approx(float(expected), rel=1e-6)
    x = torch.randn(1, 2, 3, dtype=torch.float64)
    given = torch.randn_like(x).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda g: losses.hidden_states([g], [x]), (given,), eps=1e-4, atol=1e-2, rtol=1e-2
    )  # in float32


# ------------------------------------------------------------------------------------------------------------ domains


def domain(name: str, windows: int, weight: float, length: int = 16, low: int = 0, high: int = 64) -> Domain:
    generator = torch.Generator().manual_seed(len(name))
    ids = torch.randint(low, high, (windows + 1, length), generator=generator)
    part = TextPart(name, ids.numel(), name, None, None, False)
    return Domain(part, weight, ids[:-1], ids[-1:])


def test_domains_take_turns_by_weight_and_every_window_comes_before_any_comes_again() -> None:
    a, b = domain("a", 30, 0.75), domain("bb", 10, 0.25)
    turns = Turns([a, b], seed=1)
    batch = turns.batch(40)
    of_a = [row for row in batch if any(torch.equal(row, w) for w in a.train)]
    assert len(of_a) == 30
    assert torch.equal(torch.stack(of_a).sort(0)[0], a.train.sort(0)[0])
    assert torch.equal(Turns([a, b], seed=1).batch(40), batch)
    assert not torch.equal(Turns([a, b], seed=2).batch(40), batch)


def test_turns_go_on_from_their_state() -> None:
    domains = [domain("a", 7, 0.6), domain("bb", 5, 0.4)]
    turns = Turns(domains, seed=0)
    turns.batch(9)
    turns.follow({"a": 1.0, "bb": 3.0})
    other = Turns(domains, seed=0)
    other.restore(turns.state())
    assert torch.equal(turns.batch(11), other.batch(11))


def test_weights_follow_the_worst_domain_within_bounds_and_a_small_text_is_not_worn_out() -> None:
    domains = [domain("a", 40, 0.5), domain("bb", 2, 0.5)]
    turns = Turns(domains, seed=0)
    turns.follow({"a": 1.0, "bb": 1.0})
    assert turns.weights == pytest.approx({"a": 0.5, "bb": 0.5})
    turns.follow({"a": 0.1, "bb": 9.0})
    assert turns.weights["bb"] / turns.weights["a"] <= 9 + 1e-9
    assert turns.weights["bb"] > 0.8
    batch = turns.batch(40)
    worn = sum(any(torch.equal(row, w) for w in domains[1].train) for row in batch)
    assert worn == 2 * EPOCHS
    with pytest.raises(OutOfTextError):
        turns.batch(1000)


# ------------------------------------------------------------------------------------------------------------ methods


@pytest.mark.parametrize("family", ["llama", "gpt2", "phi3"])
def test_merged_adapters_are_the_model_with_adapters(family: str) -> None:
    config = tiny_config(family)
    student = tiny_model(config).double()
    architecture = architecture_of(config, family)
    settings = RunConfig(model="x", recover="lora", recover_rank=3)
    dense = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    model: Any = methods.get("lora").prepare(student, architecture, settings)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert all("lora_" in name for name in trained)
    linear = sum(1 for name in dense if name.endswith("weight") and architecture_has(architecture, name))
    assert len(trained) == 2 * linear
    with torch.no_grad():
        for parameter in trained.values():
            parameter += 0.1 * torch.randn_like(parameter)
    ids = torch.arange(12)[None]
    expected = model.double()(ids).logits
    merged = methods.get("lora").finish(model)
    torch.testing.assert_close(merged(ids).logits, expected, rtol=1e-10, atol=1e-10)
    assert merged.state_dict().keys() == dense.keys()
    assert any(not torch.equal(tensor, dense[name]) for name, tensor in merged.state_dict().items())


def architecture_has(architecture: Any, name: str) -> bool:
    """Whether this is the matrix of one of the blocks' linear layers."""
    named = {w.name for of in architecture.by_block for w in of.block_weights() if len(w.axes) == 2}
    path = name.removeprefix(f"{architecture.family.blocks}.")
    return path != name and path.partition(".")[2] in named


def test_adapters_need_peft_and_linear_layers(monkeypatch: pytest.MonkeyPatch) -> None:
    config = tiny_config("mixtral")
    with pytest.raises(BadInputError, match="experts"):
        methods.get("lora").check(architecture_of(config, "mixtral"))
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(BadInputError, match=r"pip install 'slimexport\[lora\]'"):
        methods.get("lora").check(architecture_of(tiny_config("llama"), "llama"))


def test_distill_trains_the_blocks_and_leaves_embedding_and_head() -> None:
    config = tiny_config("llama")
    student = tiny_model(config)
    model = methods.get("distill").prepare(student, architecture_of(config, "llama"), RunConfig(model="x"))
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {name for name, _ in model.named_parameters() if "embed_tokens" in name or "lm_head" in name}


# --------------------------------------------------------------------------------------------------------------- chat


class Scripted:
    """A model that says after each token what `script` has for it, and w9 after any other."""

    device = torch.device("cpu")
    config = generation_config = None

    def __init__(self, script: dict[int, int]):
        self.script = script

    def forward(self, input_ids: torch.Tensor, **_: Any) -> Any:
        logits = torch.zeros(len(input_ids), 1, VOCAB)
        for row, last in enumerate(input_ids[:, -1].tolist()):
            logits[row, 0, self.script.get(last, 12)] = 1.0
        return SimpleNamespace(logits=logits, past_key_values=None)

    __call__ = forward


ENDS, LOOPS, MARKS, SILENT = ({12: 13, 13: 2}, {12: 13, 13: 12}, {12: 1, 1: 2}, {0: 2})  # 2: </s>, 1: <s>, 0: <unk>


@pytest.mark.parametrize(("script", "ended"), [(ENDS, True), (LOOPS, False), (MARKS, False), (SILENT, False)])
def test_an_answer_ends_its_turn_and_has_no_other_marks(script: dict[int, int], ended: bool) -> None:
    assert chat_text.ended(Scripted(script), tiny_tokenizer(), asked=3, tokens=8) == [ended] * 3


def test_what_the_student_still_answers_is_counted_where_the_teacher_does() -> None:
    asks = Chat(Scripted(ENDS), tiny_tokenizer())
    assert (asks.ended(Scripted(ENDS)), asks.ended(Scripted(LOOPS))) == (ASKED, 0)
    lost, kept = asks.check(ASKED, 0), asks.check(0, 0)
    assert lost is not None
    assert kept is not None
    assert "give chat a larger part" in str(warning(lost))
    assert warning(kept) is None  # nothing that training did
    never = Chat(Scripted(LOOPS), tiny_tokenizer())
    assert never.ended(Scripted(ENDS)) == 0
    assert never.check(0, 0) is None
    plain = tiny_tokenizer()
    plain.chat_template = None
    assert Chat(Scripted(ENDS), plain).check(0, 0) is None


def test_answers_in_the_template_are_a_domain_of_the_default_text() -> None:
    teacher, tokenizer = tiny_model(tiny_config("llama")).eval(), tiny_tokenizer()
    found, notes = read_domains("default", tokenizer, teacher, 64, 0)
    assert [of.name for of in found] == ["chat"]  # its vocabulary has none of the words of the others
    assert len(notes) == 4
    tokenizer.chat_template = None
    with pytest.raises(BadInputError, match="Nothing of the recovery text default is here"):
        read_domains("default", tokenizer, teacher, 64, 0)


# ----------------------------------------------------------------------------------------------------------- training


def models() -> tuple[Any, Any]:
    """A student that is the teacher with noise on it."""
    torch.manual_seed(0)
    teacher = tiny_model(tiny_config("llama")).float()
    student = tiny_model(tiny_config("llama")).float()
    student.load_state_dict(teacher.state_dict())
    with torch.no_grad():
        for parameter in student.parameters():
            parameter += 0.3 * parameter.std() * torch.randn_like(parameter)
    student.requires_grad_(True)
    for part in (student.get_input_embeddings(), student.get_output_embeddings()):
        part.requires_grad_(False)
    return student, teacher.eval().requires_grad_(False)


def texts() -> list[Domain]:
    return [domain("a", 40, 0.6), domain("bb", 20, 0.4)]


def recipe(budget: str = "12 steps", **more: Any) -> Recipe:
    given = {"learning_rate": 2e-3, "sequences": 4, "together": 2}
    return Recipe(Budget.parse(budget), **{**given, **more})  # type: ignore[arg-type]


def trained(place: Path, how: Recipe, student: Any = None, teacher: Any = None) -> tuple[Any, Trained]:
    own, other = models()
    student = own if student is None else student
    made = Training(student, teacher or other, texts(), how, Progress(quiet=True)).run(TrainingState(place, {"of": 1}))
    return student, made


def test_training_brings_the_student_nearer_and_leaves_what_is_frozen(tmp_path: Path) -> None:
    before, _ = models()
    student, made = trained(tmp_path, recipe("40 steps"))
    assert made.stopped == "budget"
    assert made.steps == 40
    assert made.tokens == 40 * 4 * 16
    assert made.best > 0
    assert made.points[made.best].divergence < 0.9 * made.points[0].divergence
    assert made.points[0].step == 0
    assert made.points[-1].step == 40
    assert torch.equal(student.get_input_embeddings().weight, before.get_input_embeddings().weight)


def test_the_state_that_was_best_is_the_one_that_comes_out(tmp_path: Path) -> None:
    _, teacher = models()
    student, _ = models()
    student.load_state_dict({name: t * (1 + 1e-4) for name, t in teacher.state_dict().items()})  # hardly to be bettered
    before = {name: parameter.detach().clone() for name, parameter in student.named_parameters()}
    student, made = trained(tmp_path, recipe("30 steps", learning_rate=0.1), student, teacher)
    assert made.best == 0
    assert made.stopped == "patience"
    assert "the held-out windows got worse by far" in made.notes[0]
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, before[name]), name


class Stopped(Exception):
    pass


@pytest.mark.parametrize(("after", "optimiser"), [(3, "adamw"), (5, "adamw"), (11, "adamw"), (5, "adamw-8bit")])
def test_a_training_that_is_stopped_goes_on_to_the_same_bytes(tmp_path: Path, after: int, optimiser: str) -> None:
    how = recipe(optimiser=optimiser)
    whole, expected = trained(tmp_path / "whole", how)
    student, teacher = models()
    calls = 0
    original = student.forward

    def forward(*arguments: Any, **named: Any) -> Any:
        nonlocal calls
        calls += torch.is_grad_enabled()
        if calls > 2 * after:
            raise Stopped
        return original(*arguments, **named)

    student.forward = forward
    with pytest.raises(Stopped):
        trained(tmp_path / "part", how, student, teacher)
    resumed, made = trained(tmp_path / "part", how)
    assert made.steps == expected.steps
    assert made.best == expected.best
    for a, b in zip(made.points, expected.points, strict=True):
        assert (a.step, a.loss, a.divergence, a.held_out) == (b.step, b.loss, b.divergence, b.held_out)
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name]), name


def test_moments_of_eight_bits_take_a_quarter_and_get_nearly_as_far(tmp_path: Path) -> None:
    students, saved = [], []
    for name in ("adamw", "adamw-8bit"):
        student, made = trained(tmp_path / name, recipe("40 steps", optimiser=name))
        state = TrainingState(tmp_path / name, {"of": 1}).tensors("moments")
        students.append(made.points[-1].divergence / made.points[0].divergence)
        large = {n for n, p in student.named_parameters() if p.requires_grad and p.numel() >= 4096}
        assert large
        saved.append(sum(t.nbytes for key, t in state.items() if key.partition(".")[2] in large))
        numbers = sum(p.numel() for n, p in student.named_parameters() if n in large)
        assert saved[-1] == pytest.approx(optimisers.MOMENT_BYTES[name] * numbers, rel=0.01)
    assert students[0] < 0.9
    assert students[1] == pytest.approx(students[0], rel=0.05)
    assert saved[1] < 0.26 * saved[0]


def test_moments_of_eight_bits_need_their_package(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    optimisers.check("adamw")
    with pytest.raises(BadInputError, match=r"needs bitsandbytes.*pip install 'slimexport\[8bit\]'"):
        optimisers.check("adamw-8bit")


def test_one_that_was_given_up_is_given_up_when_it_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the process was killed after the last save: the same points, and no step more."""
    original = Training._measured

    def ever_worse(self: Any) -> Any:
        return original(self)[0], 1 + 0.01 * self.at.step

    monkeypatch.setattr(Training, "_measured", ever_worse)
    first, again = (trained(tmp_path, recipe("24 steps"))[1] for _ in range(2))
    assert first.stopped == again.stopped == "patience"
    assert (again.steps, again.best, again.points) == (first.steps, 0, first.points)
    assert first.steps == training.PATIENCE * 24 // training.EVALUATIONS


def test_text_that_was_worn_out_is_said_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(training, "PATIENCE", 100)
    made = [trained(tmp_path, recipe("1000 steps", learning_rate=1e-5))[1] for _ in range(2)]
    assert [of.stopped for of in made] == ["text", "text"]
    assert [of.notes for of in made] == [(training.WORN_OUT,)] * 2
    assert made[0].points == made[1].points


@pytest.mark.parametrize("method", ["distill", "local"])
def test_text_for_less_than_a_step_is_refused(tmp_path: Path, method: str) -> None:
    student, teacher = models()
    make = methods.get(method).training(architecture_of(teacher.config, "tiny"))
    with pytest.raises(BadInputError, match="holds 3 sequences to train on, of 16 tokens, needed are 4"):
        make(student, teacher, [domain("a", 2, 0.5), domain("b", 1, 0.5)], recipe(), Progress(quiet=True))


def test_a_student_whose_loss_is_not_finite_is_refused(tmp_path: Path) -> None:
    student, _ = models()
    with torch.no_grad():
        student.model.norm.weight.fill_(math.nan)
    with pytest.raises(BadInputError, match="is not finite"):
        trained(tmp_path, recipe(), student)


def test_memory_may_run_out_where_it_is_judged_as_well(tmp_path: Path) -> None:
    student, teacher = models()
    original = student.forward

    def forward(ids: torch.Tensor, **named: Any) -> Any:
        if len(ids) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(ids, **named)

    student.forward = forward
    _, made = trained(tmp_path, recipe("2 steps"), student, teacher)
    assert made.steps == 2
    assert "going on with 1 sequences" in made.notes[0]


def test_another_recovery_is_not_gone_on_with(tmp_path: Path) -> None:
    trained(tmp_path, recipe("2 steps"))
    with pytest.raises(BadInputError, match="Cannot resume"):
        TrainingState(tmp_path, {"of": 2}).numbers()


def test_a_loss_that_is_not_finite_is_gone_back_from(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    original = training.distillation

    def once(*arguments: Any, **named: Any) -> torch.Tensor:
        nonlocal calls
        calls += 1
        loss = original(*arguments, **named)
        return loss * math.nan if calls == 9 else loss

    monkeypatch.setattr(training, "distillation", once)
    student, made = trained(tmp_path, recipe("20 steps"))
    assert len(made.notes) == 1
    assert "not finite" in made.notes[0]
    assert made.stopped == "budget"
    assert made.best > 0
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())


@pytest.mark.parametrize("found", [math.nan, 1e9])
def test_held_out_windows_that_got_worse_by_far_are_gone_back_from(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, found: float
) -> None:
    """Without a trace in whose turn it is, and in the curve."""
    original = Training._measured
    failed: list[int] = []

    def once(self: Any) -> Any:
        held_out, judged = original(self)
        if not failed and self.at.step > 2:
            failed.append(self.at.step)
            return {name: HeldOut(found if name == "bb" else 1.0, found) for name in held_out}, found
        return held_out, judged

    monkeypatch.setattr(Training, "_measured", once)
    _, expected = trained(tmp_path / "never", recipe("2 steps"))
    student, made = trained(tmp_path / "once", recipe("24 steps"))
    assert failed == [4]
    assert made.notes == ("at step 4 the held-out windows got worse by far: back to step 0, at half the learning rate",)
    assert made.steps == 24
    assert made.best > 0
    assert [point.step for point in made.points] == [0, 4, 8, 12, 16, 20, 24]
    assert made.points[1].weights == expected.points[1].weights
    for point in made.points:
        assert all(math.isfinite(weight) for weight in point.weights.values())
        assert point.judged < 1e6
    assert all(bool(torch.isfinite(p).all()) for p in student.parameters())


def test_one_that_never_is_ends_the_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = training.distillation
    monkeypatch.setattr(training, "distillation", lambda *a, **k: original(*a, **k) * math.nan)
    _, made = trained(tmp_path, recipe("20 steps"))
    assert made.stopped == "instability"
    assert made.best == 0
    assert "given up" in made.notes[-1]


def test_a_device_that_runs_out_of_memory_is_given_less_at_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected, _ = trained(tmp_path / "plenty", recipe("3 steps", together=1))
    seen: list[int] = []
    original = training.Training._loss

    def loss(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        seen.append(len(ids))
        return original(self, ids)

    monkeypatch.setattr(training.Training, "_loss", loss)
    room = 1
    student, made = trained(tmp_path / "little", recipe("3 steps", together=4))
    assert made.steps == 3
    assert seen == [1] * 12
    assert [note.rpartition("with ")[2] for note in made.notes] == [f"{n} sequences in a forward pass" for n in (2, 1)]
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(parameter, dict(expected.named_parameters())[name], rtol=1e-4, atol=1e-6)
    room = 0
    with pytest.raises(BadInputError, match="with one sequence in a forward pass: --recover local needs less"):
        trained(tmp_path / "none", recipe("3 steps", together=4, lighter="--recover local"))


def test_a_resumed_training_remembers_that_there_was_less_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    original = Training._loss

    def loss(self: Any, ids: torch.Tensor) -> torch.Tensor:
        if len(ids) > room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1 GiB")
        return original(self, ids)

    monkeypatch.setattr(Training, "_loss", loss)
    room = 2
    trained(tmp_path, recipe("3 steps", together=4))
    student, teacher = models()
    again = Training(student, teacher, texts(), recipe("3 steps", together=4), Progress(quiet=True))
    room = 4
    again.run(TrainingState(tmp_path, {"of": 1}))
    assert again.together == 2
    assert len(again.notes) == 1


def test_outputs_of_blocks_can_count_as_well(tmp_path: Path) -> None:
    """Toward the teacher's, however many sequences go through at once; the last is seen by the logits alone."""
    student, teacher = models()
    ids = texts()[0].train[:4]

    def gradients(together: int, weight: float) -> tuple[float, dict[str, torch.Tensor]]:
        how = recipe(together=together, hidden_weight=weight)
        made = Training(student, teacher, texts(), how, Progress(quiet=True))
        loss = made._gradient(ids)
        return loss, {name: p.grad.clone() for name, p in student.named_parameters() if p.grad is not None}

    (plain, _), (loss, whole), (same, parts) = gradients(4, 0.0), gradients(4, 0.5), gradients(1, 0.5)
    assert loss > plain
    assert same == pytest.approx(loss, rel=1e-5)
    for name, gradient in whole.items():
        torch.testing.assert_close(parts[name], gradient, rtol=1e-3, atol=1e-5)
    with torch.no_grad():
        own, other = (model(ids, output_hidden_states=True).hidden_states[1:-1] for model in (student, teacher))
    assert loss - plain == pytest.approx(0.5 * float(losses.hidden_states(own, other)), rel=1e-3)
    _, made = trained(tmp_path, recipe("24 steps", hidden_weight=0.1))
    assert made.best > 0


def test_a_budget_shorter_than_a_step_is_refused(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="shorter than one step"):
        trained(tmp_path, recipe("63 tokens"))


def test_all_of_the_text_is_used_a_few_times_and_not_more(tmp_path: Path) -> None:
    _, made = trained(tmp_path, recipe("1000 steps"))
    assert made.stopped in ("text", "patience")
    assert made.steps <= EPOCHS * 60 / 4
    if made.stopped == "text":
        assert any("more text" in note for note in made.notes)


@pytest.fixture
def rates(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The learning rates of all steps, by a clock that goes on by a quarter of a second a step, and a second a look at
    the held-out windows."""
    clock, seen = [0.0], list[float]()
    step, measured = Training._step, Training._measured

    def slow(self: Any, batch: torch.Tensor) -> float | None:
        loss = step(self, batch)
        clock[0] += 0.25
        seen.append(self.optimiser.param_groups[0]["lr"])
        return loss

    def slower(self: Any) -> Any:
        clock[0] += 1.0
        return measured(self)

    monkeypatch.setattr(Training, "_step", slow)
    monkeypatch.setattr(Training, "_measured", slower)
    monkeypatch.setattr(training, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(training, "PATIENCE", 100)
    return seen


def test_a_time_becomes_steps(tmp_path: Path, rates: list[float]) -> None:
    _, made = trained(tmp_path, recipe("14s"))
    assert made.stopped == "budget"
    assert 13 < made.seconds <= 14
    assert made.points[-1].step == made.steps == 4 * (made.seconds - len(made.points))
    assert 3 <= len(made.points) <= 4  # judging is to take no more than a sixth
    _, made = trained(tmp_path / "short", recipe("0.001s"))
    assert made.steps == 1


def test_the_rate_follows_a_time_as_it_follows_steps(tmp_path: Path, rates: list[float]) -> None:
    """Warm-up from the first step on, however long the first look took, and the cosine to the end."""
    _, made = trained(tmp_path, recipe("16s"))
    by_time = [rate / recipe().learning_rate for rate in rates]
    rates.clear()
    trained(tmp_path / "steps", recipe(f"{made.steps} steps"))
    by_steps = [rate / recipe().learning_rate for rate in rates]
    assert made.steps > 40
    assert by_time[0] == pytest.approx(0.1)
    assert max(abs(a - b) for a, b in zip(by_time, by_steps, strict=True)) < 0.15


def test_after_a_failure_a_time_is_still_the_same_time(
    tmp_path: Path, rates: list[float], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Steps that are gone back by took their time: neither warm-up nor the pace of judging begins anew."""
    original = training.distillation

    def once(*arguments: Any, **named: Any) -> torch.Tensor:
        loss = original(*arguments, **named)
        return loss * math.nan if len(rates) == 19 else loss

    monkeypatch.setattr(training, "distillation", once)
    _, made = trained(tmp_path, recipe("16s"))
    (note,) = made.notes
    assert "at step 19 the loss was not finite: back to step 0" in note
    assert made.steps == len(rates) - 20
    after = [2 * rate / rates[19] for rate in rates[20:]]
    assert after[0] == pytest.approx(1.0, abs=0.1)
    assert all(b <= a for a, b in pairwise(after))
    assert min(b.step - a.step for a, b in pairwise(made.points)) >= 8


def test_the_text_alone_needs_no_teacher(tmp_path: Path) -> None:
    asked: list[int] = []

    class Silent(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = models()[1]

        def forward(self, *arguments: Any, **named: Any) -> Any:
            asked.append(1)
            return self.inner(*arguments, **named)

    _, made = trained(tmp_path, recipe("4 steps", text_share=1.0), None, Silent())
    assert len(asked) == len(made.points) * len(texts())  # to judge by
    assert made.steps >= training.PATIENCE
    assert made.points[1].judged == pytest.approx(sum(of.nll for of in made.points[1].held_out.values()) / 2)


# ------------------------------------------------------------------------------------------------------ block by block


def test_every_token_counts_once_however_large_it_is() -> None:
    wanted = torch.randn(2, 3, 5, dtype=torch.float64) * torch.tensor([1.0, 1000.0, 30.0])[None, :, None]
    made = wanted + torch.randn_like(wanted)
    each = [
        float((m - w).square().sum() / w.square().sum())
        for m, w in zip(made.view(6, 5), wanted.view(6, 5), strict=True)
    ]
    assert float(losses.relative_error(made, wanted)) == pytest.approx(sum(each) / 6, rel=1e-4)
    given = (torch.randn(1, 2, 3, dtype=torch.float64)).requires_grad_()
    to = torch.randn(1, 2, 3, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda x: losses.relative_error(x, to), (given,), eps=1e-3, atol=1e-2, rtol=1e-2)


def blockwise(place: Path, how: Recipe, student: Any = None) -> tuple[Any, Trained]:
    own, teacher = models()
    student = own if student is None else student
    architecture = architecture_of(teacher.config, "tiny")
    make = methods.get("local").training(architecture)
    state = TrainingState(place, {"of": 1})
    return student, make(student, teacher, texts(), how, Progress(quiet=True)).run(state)


def test_blocks_one_by_one_bring_the_student_nearer(tmp_path: Path) -> None:
    before, _ = models()
    student, made = blockwise(tmp_path, recipe("60 steps", text_share=0.0))
    assert made.stopped == "budget"
    assert made.steps == 60 // 3 * 3
    assert made.tokens == made.steps * 4 * 16
    assert made.best == len(made.points) - 1
    assert made.points[-1].divergence < 0.9 * made.points[0].divergence
    for name, parameter in student.named_parameters():
        trained = not torch.equal(parameter, dict(before.named_parameters())[name])
        assert trained == name.startswith("model.layers."), name


def test_a_step_of_a_block_has_all_that_was_asked_for_in_equal_parts(tmp_path: Path) -> None:
    _, made = blockwise(tmp_path, recipe("3 steps", sequences=6, together=4))
    assert made.tokens == 3 * 6 * 16
    _, made = blockwise(tmp_path / "odd", recipe("3 steps", sequences=7, together=4))
    assert made.tokens == 3 * 8 * 16


def test_what_a_block_is_judged_by_is_not_trained_on_as_well(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Though a small domain comes again before a large one is through."""
    seen: list[torch.Tensor] = []
    original = BlockwiseTraining._states

    def states(self: Any, model: Any, ids: torch.Tensor) -> Any:
        seen.append(ids)
        return original(self, model, ids)

    monkeypatch.setattr(BlockwiseTraining, "_states", states)
    blockwise(tmp_path, recipe("30 steps"))
    windows = [tuple(window) for window in seen[0].tolist()]
    assert len(windows) > 32
    assert len(set(windows)) == len(windows)
    assert {domain.name for domain in texts() for window in domain.train.tolist() if tuple(window) in windows} == {
        "a", "bb",
    }  # fmt: skip


def test_no_more_windows_go_through_than_a_budget_can_use(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def windows(budget: str) -> int:
        student, teacher = models()
        architecture = architecture_of(tiny_config("llama"), "tiny")
        made = BlockwiseTraining(architecture, student, teacher, texts(), recipe(budget), Progress(quiet=True))
        return len(made._windows())

    assert windows("3 steps") == 16  # one step of four a block, but eight batches of two at least
    assert windows("24 steps") == 8 * 4 * 8 // 7 + 8
    assert windows("1h") > 50  # all there are, but those that came twice
    monkeypatch.setattr(blockwise_training, "PASSING", 1e-9)
    assert windows("1h") == 16


def test_a_block_that_gets_no_better_stays_as_it_was(tmp_path: Path) -> None:
    _, teacher = models()
    student, _ = models()
    student.load_state_dict(teacher.state_dict())
    blockwise(tmp_path, recipe("9 steps", learning_rate=0.5), student)
    for name, parameter in student.named_parameters():
        assert torch.equal(parameter, dict(teacher.named_parameters())[name]), name


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("after", [0, 1, 2])
def test_it_goes_on_with_the_block_it_was_at(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, after: int, autocast: torch.dtype | None
) -> None:
    how = recipe(autocast=autocast)
    whole, expected = blockwise(tmp_path / "whole", how)
    original = BlockwiseTraining._fit

    def fit(self: Any, index: int, *arguments: Any) -> None:
        if index == after and not (tmp_path / "stopped").exists():
            (tmp_path / "stopped").touch()
            raise Stopped
        original(self, index, *arguments)

    monkeypatch.setattr(BlockwiseTraining, "_fit", fit)
    with pytest.raises(Stopped):
        blockwise(tmp_path / "part", how)
    resumed, made = blockwise(tmp_path / "part", how)
    assert [p.divergence for p in made.points] == [p.divergence for p in expected.points]
    for name, parameter in resumed.named_parameters():
        assert torch.equal(parameter, dict(whole.named_parameters())[name]), name


def test_every_block_needs_a_step_and_a_time_is_divided_among_them(tmp_path: Path) -> None:
    with pytest.raises(BadInputError, match="one step for each of 3 blocks"):
        blockwise(tmp_path / "short", recipe("2 steps"))
    _, made = blockwise(tmp_path / "time", recipe("2s"))
    assert made.steps >= 3  # one for each block at least
    assert made.stopped == "budget"


# -------------------------------------------------------------------------------------------------------------- memory


def memory_of(
    how: Recipe, length: int = 64, one_by_one: bool = False, method: str = "distill", attention: str = "sdpa"
) -> memory.Needs:
    config = tiny_config("llama")
    architecture = architecture_of(config, "tiny")
    student = methods.get(method).prepare(tiny_model(config), architecture, RunConfig(model="x"))
    student.set_attn_implementation(attention)
    return memory.needs(student, tiny_model(config), architecture, how, length, CPU, one_by_one=one_by_one)


def test_memory_grows_with_what_is_trained_and_with_tokens_at_once() -> None:
    plain = memory_of(recipe()).host
    assert memory_of(recipe(together=4)).host > plain
    assert memory_of(recipe(), 128).host == memory_of(recipe(together=4)).host
    assert memory_of(recipe(), method="lora").host < plain
    assert memory_of(recipe(optimiser="adamw-8bit")).host < plain
    assert memory_of(recipe(hidden_weight=0.1)).host > plain
    eager = memory_of(recipe(), attention="eager").host
    # [heads, length, length] of every block, in float32 three times
    assert eager - plain == 3 * 2 * 64 * (3 * 4 * 6 * 64)
    assert memory_of(recipe()).device == 0
    trained = sum(p.numel() for p in models()[0].parameters() if p.requires_grad)
    assert plain > memory.LIBRARIES_BYTES + 16 * trained


def test_what_needs_less_is_none_of_what_is_used_already() -> None:
    def said(family: str = "llama", **asked: Any) -> str:
        config = RunConfig(model="x", **asked)
        return memory.lighter(config, architecture_of(tiny_config(family), "tiny"))

    shorter = "a shorter --recover-length"
    eight = "--recover-optimizer adamw-8bit"
    assert said(recover="distill") == f"{eight}, or --recover local, or --recover lora, or {shorter}"
    assert said("mixtral", recover="distill") == f"{eight}, or --recover local, or {shorter}"
    assert said(recover="local") == f"{eight}, or {shorter}"
    assert said(recover="local", recover_optimizer="adamw-8bit") == shorter
    assert said(recover="lora") == shorter


def test_fewer_sequences_at_once_keep_a_limit() -> None:
    config = tiny_config("llama")
    architecture = architecture_of(config, "tiny")
    student, teacher = models()

    def fitted(limit: int | None) -> Recipe:
        given = RunConfig(model="x", recover_length=64, max_memory=limit and f"{limit}B")
        return memory.fitting(student, teacher, architecture, recipe(together=4), given, CPU)

    assert fitted(None).together == 4
    each = [memory.needs(student, teacher, architecture, recipe(together=n), 64, CPU).host for n in (1, 2, 4)]
    assert [fitted(limit).together for limit in each] == [1, 2, 4]
    with pytest.raises(BadInputError, match=r"Training needs .* with one sequence of 64 tokens"):
        fitted(each[0] - 1000)
