"""What training gives back, and whether pruning was worth it: the same budget for our models and for controls.

    python benchmarks/recovery.py --data DATA --work /tmp/recovery [--only pruned/distill] [--ratios 0.3] [--budget 60m]
    python benchmarks/recovery.py --render      # the table, from the JSON alone

DATA holds `wikitext2/` and `arc/` (see texts.py). One row is one model of the parameters that a ratio leaves, trained
by `slimexport.recovery`, and measured on the texts of the quality table, before and after. It is:

    pruned     `slimexport prune` as it is (trained by distill, by local, and by lora as LLM-Pruner does: rank 8, the
               text alone)
    magnitude  the same sizes, what goes chosen by magnitude, nothing compensated
    first      the same sizes, the dense model's first heads and channels ("Rethinking the Value of Network Pruning",
               arXiv 1810.05270)
    random     the same sizes, blocks from random weights (likewise)
    depth      whole blocks removed, those whose removal moves the output least, until as few parameters are left

With --part it is measured on the beginning of three of the texts: enough to tell controls from ours, in a tenth of the
time. Rows that are in the JSON already are not measured again; pruned models and a training that was interrupted are
kept in --work.
"""

from __future__ import annotations

import argparse
import copy
import hashlib
import json
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accuracy import Reference, evaluate, kept_reference
from common import RESULTS, load_rows, save_rows, table
from quality import RATIOS, SHIFTED
from texts import WINDOW, evaluation_texts

from slimexport import pipeline
from slimexport.architectures.family import Kept
from slimexport.artifacts import BlockSizes, PruningPlan, from_dict, read_json, write_json
from slimexport.checkpoint import load
from slimexport.config import RunConfig
from slimexport.environment import environment
from slimexport.loading import LoadedModel, load_model
from slimexport.progress import Progress
from slimexport.pruning.shrink import shrink_block
from slimexport.ranks import ALONE
from slimexport.recovery.domains import Domain, read_domains, save_domains, saved_domains
from slimexport.recovery.losses import distances, targets_of
from slimexport.recovery.methods import registry as methods
from slimexport.recovery.state import TrainingState
from slimexport.stages.recover import training_of

TEXTS = ("wikitext2", *SHIFTED)
CURVE = {"wikitext2": 20, "articles": 10, "arc": 10}  # windows on which the model is looked at while it is trained
INT8_TOKENS = 20_000  # of WikiText-2's test split
LLM_PRUNERS: dict[str, Any] = {"recover_rank": 8, "recover_text_share": 1.0}  # its LoRA: the text alone, rank 8
PICTURE = Path(__file__).parent.parent / "docs" / "recovery.svg"
STARTS = {
    "pruned": "slimexport", "magnitude": "magnitude", "depth": "whole blocks removed", "first": "first rows",
    "random": "random blocks",
}  # fmt: skip
TITLES = {"wikitext2": "WikiText-2 test", "articles": "other articles"}
FURTHEST = 30.0  # times dense that is drawn
DEPTH_WINDOWS = 4  # by which blocks are chosen that go as a whole


@dataclass(frozen=True)
class Row:
    """What starts, how it is trained, for how long."""

    start: str
    method: str
    ratio: float
    budget: str

    @property
    def key(self) -> str:
        return f"{self.start}/{self.method}/{self.ratio:g}/{self.budget}"


def wanted(budget: str) -> Iterator[Row]:
    """All rows, the most telling first."""
    for start, method in (("pruned", "distill"), ("pruned", "lora"), ("magnitude", "distill"), ("depth", "distill"),
                          ("first", "distill"), ("random", "distill"), ("pruned", "local")):  # fmt: skip
        for ratio in RATIOS:
            yield Row(start, method, ratio, budget)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="keeps pruned models and what the dense model says")
    parser.add_argument("--only", help="starts, or START/METHOD, joined by commas")
    parser.add_argument("--ratios", default="0.2,0.3,0.5")
    parser.add_argument("--budget", default="60m")
    parser.add_argument("--text", default="default", help="as --recover-text")
    parser.add_argument("--length", type=int, default=256, help="tokens of a sequence")
    parser.add_argument("--step", type=int, default=2048, help="tokens of a step")
    parser.add_argument("--rate", type=float, help="as --recover-learning-rate")
    parser.add_argument("--arc-easy", action="store_true", help="also the task, through lm-eval")
    parser.add_argument("--part", action="store_true", help="measured on the beginnings of three texts")
    parser.add_argument("--out", type=Path, default=RESULTS / "recovery.json")
    parser.add_argument("--int8", action="store_true", help="also as int8 graphs, of rows that are there as well")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        Bench(options, rows).run()
    draw(rows, options.picture)
    print(render(rows))


class Bench:
    def __init__(self, options: argparse.Namespace, rows: list[dict[str, Any]]):
        self.options, self.rows = options, rows
        options.work.mkdir(parents=True, exist_ok=True)
        self.dense: LoadedModel = load_model(RunConfig(model=options.model))
        self.texts = evaluation_texts(self.dense.tokenizer, options.data)
        self.parts = {name: self.texts[name][: windows * WINDOW] for name, windows in CURVE.items()}
        self.part_references = {
            name: kept_reference(options.work / f"dense-{name}-part.safetensors", self.dense.model, part)
            for name, part in self.parts.items()
        }
        self.starts: dict[str, Callable[[float], Any]] = {
            "pruned": lambda ratio: load(self.pruned(ratio), dtype="float32")[0],
            "magnitude": lambda ratio: load(self.pruned(ratio, criterion="magnitude"), dtype="float32")[0],
            "first": self.first,
            "random": self.random,
            "depth": self.depth,
        }

    def run(self) -> None:
        ratios = [float(ratio) for ratio in self.options.ratios.split(",")]
        only = self.options.only.split(",") if self.options.only else None
        for row in wanted(self.options.budget):
            if row.ratio not in ratios or (only and not {row.start, f"{row.start}/{row.method}"} & set(only)):
                continue
            record = next((record for record in self.rows if record["key"] == row.key), None)
            if record is None:
                record = self.measured(row)
                self.rows.append(record)
                save_rows(self.options.out, self.rows)
                print(row.key, {n: round(t["x_dense"], 3) for n, t in record["after"].items()}, flush=True)
            if self.options.int8 and "int8" not in record:
                record["int8"] = self.int8(row)
                save_rows(self.options.out, self.rows)
                print(row.key, record["int8"], flush=True)

    def measured(self, row: Row) -> dict[str, Any]:
        student = self.starts[row.start](row.ratio)
        parameters = sum(p.numel() for p in student.parameters())
        config = self.config(row)
        domains, notes, read = self.domains(config)
        teacher = replace(self.dense, model=copy.deepcopy(self.dense.model))
        training = training_of(config, student, teacher, self.dense.architecture, domains, Progress(), ALONE)
        place = self.place(row)
        state = TrainingState(place, {**asdict(row), **self.settings()})
        curve = self.watched(training, place / "curve.json")
        before = {} if self.options.part else self.figures(student)
        made = training.run(state)
        student = methods.get(row.method).finish(training.student).eval()
        looked = {at["step"]: at["figures"] for at in curve}
        if self.options.part:
            after = looked.get(made.points[made.best].step) or self.figures(student)
            before = looked.get(0) or self.figures(self.starts[row.start](row.ratio))
        else:
            after = self.figures(student)
        record = {
            "key": row.key, **asdict(row), "parameters": parameters,
            **self.settings(), "machine": str(environment()["cpu"]), "steps": made.steps, "tokens": made.tokens,
            "kept_tokens": made.points[made.best].tokens, "seconds": made.seconds, "seconds_of_text": read,
            "stopped": made.stopped, "notes": [*notes, *made.notes], "points": [asdict(p) for p in made.points],
            "curve": [_point(at) for at in curve], "before": before, "after": after,
        }  # fmt: skip
        if self.options.arc_easy:
            from tasks import arc_easy

            questions = self.options.data / "arc" / "arc_easy_validation.jsonl"
            record["arc_easy"] = arc_easy(student, self.dense.tokenizer, questions)
        return record

    def domains(self, config: RunConfig) -> tuple[list[Domain], list[str], float]:
        """With the seconds that it took when they were read: what the model writes of them takes minutes."""
        asked = json.dumps([config.recover_text, config.recover_length, config.seed])
        kept = self.options.work / f"text-{hashlib.sha256(asked.encode()).hexdigest()[:12]}.safetensors"
        if not kept.is_file():
            started = time.monotonic()
            found, notes = read_domains(
                config.recover_text, self.dense.tokenizer, self.dense.model, config.recover_length, config.seed
            )
            save_domains(kept, found, {"notes": notes, "seconds": time.monotonic() - started})
        domains, about = saved_domains(kept)
        return domains, about["notes"], about["seconds"]

    def config(self, row: Row) -> RunConfig:
        more = LLM_PRUNERS if row.method == "lora" else {}
        return RunConfig(
            model=self.options.model, recover=row.method, recover_budget=row.budget, recover_text=self.options.text,
            recover_length=self.options.length, recover_sequences=self.options.step // self.options.length,
            recover_learning_rate=self.options.rate, **more,
        )  # fmt: skip

    def settings(self) -> dict[str, Any]:
        """Those of all rows of this call."""
        text = self.options.text.replace(f"{self.options.data}/", "")
        return {"text": text, "length": self.options.length, "step": self.options.step, "rate": self.options.rate}

    def place(self, row: Row) -> Path:
        return self.options.work / row.key.replace("/", "_").replace(" ", "-")

    def int8(self, row: Row) -> dict[str, Any]:
        """Of the model that came out of the training: bytes of its int8 graph, and its perplexity in ONNX Runtime times
        that of the dense model in float32."""
        from size import exported

        method = methods.get(row.method)
        model = method.prepare(self.starts[row.start](row.ratio), self.dense.architecture, self.config(row))
        kept = TrainingState(self.place(row), {}).tensors("best")
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                if name in kept:
                    parameter.copy_(kept[name])
        student = method.finish(model).eval().requires_grad_(False)
        ids = self.texts["wikitext2"][:INT8_TOKENS]
        dense = kept_reference(self.options.work / "dense-wikitext2-int8.safetensors", self.dense.model, ids)
        size, nll = exported(student, self.dense.tokenizer, self.options.work, "int8", ids.numpy())
        return {"bytes": size, "x_dense": math.exp(nll - math.log(dense.perplexity)), "tokens": len(ids)}

    def watched(self, training: Any, kept: Path) -> list[dict[str, Any]]:
        """What is filled in while `training` runs, and kept in the file: at every point of its own, or with --part at
        every second one, the figures on CURVE. The time that takes is not the training's."""
        curve: list[dict[str, Any]] = read_json(kept)["points"] if kept.is_file() else []
        judge = training._judge

        def judged(loss: float | None) -> None:
            judge(loss)
            if self.options.part and len(training.points) % 2 == 0:
                return
            begun = time.monotonic()
            model = getattr(training.student, "get_base_model", lambda: training.student)()
            at = {"step": training.at.step, "seconds": training.points[-1].seconds, "figures": self.beginnings(model)}
            curve[:] = [*(of for of in curve if of["step"] < at["step"]), at]
            write_json(kept, {"points": curve})
            print(_point(at), flush=True)
            training.begun += time.monotonic() - begun

        training._judge = judged
        return curve

    def figures(self, model: Any) -> dict[str, Any]:
        model.eval()
        if self.options.part:
            return self.beginnings(model)
        return {name: evaluate(model, self.texts[name], WINDOW, self.reference(name)) for name in TEXTS}

    def beginnings(self, model: Any) -> dict[str, Any]:
        return {name: evaluate(model, ids, WINDOW, self.part_references[name]) for name, ids in self.parts.items()}

    def reference(self, name: str) -> Reference:
        return kept_reference(self.options.work / f"dense-{name}.safetensors", self.dense.model, self.texts[name])

    # ------------------------------------------------------------------------------------------------------- starts

    def pruned(self, ratio: float, criterion: str = "slimgpt") -> Path:
        """A run directory with its checkpoint: ours, or in the same sizes by another criterion."""
        place = self.options.work / f"{criterion}-{ratio:g}"
        if (place / "checkpoint").is_dir():
            return place
        same: dict[str, Any] = {"costs": self.options.work / "costs.json"}
        if criterion != "slimgpt":
            same = {"criterion": criterion, "sizes": self.pruned(ratio) / "plan.json", "calibration_tokens": 2048}
        started = time.monotonic()
        pipeline.prune(RunConfig(model=self.options.model, ratio=ratio, **same), place, force=True)
        print(f"{place.name}: pruned in {time.monotonic() - started:.0f} s", flush=True)
        return place

    def sizes(self, ratio: float) -> tuple[BlockSizes, ...]:
        path = self.pruned(ratio) / "plan.json"
        return from_dict(PruningPlan, read_json(path), str(path)).blocks

    def first(self, ratio: float) -> Any:
        """The weights of the dense model that have the lowest numbers, in the shape of ours."""
        shaped = load(self.pruned(ratio), dtype="float32")[0]
        dense = copy.deepcopy(self.dense.model)
        of = self.dense.architecture.family.blocks
        for index, (own, sizes) in enumerate(zip(dense.get_submodule(of), self.sizes(ratio), strict=True)):
            architecture = self.dense.architecture.by_block[index]
            whole = Kept.all(self.dense.architecture.blocks[index])
            per_group = whole.of.heads_per_group
            heads = [g * per_group + h for g in range(sizes.kv_groups) for h in range(sizes.heads_per_group)]
            kept = Kept(tuple(range(sizes.kv_groups)), tuple(heads), tuple(range(sizes.channels)), whole.of)
            shrink_block(own, architecture, kept)
            shaped.get_submodule(f"{of}.{index}").load_state_dict(own.state_dict())
        rest = {name: t for name, t in dense.state_dict().items() if not name.startswith(f"{of}.")}
        shaped.load_state_dict(rest, strict=False)
        return shaped

    def random(self, ratio: float) -> Any:
        """Blocks from the family's own distribution; embedding, final norm and lm_head as they are."""
        shaped = load(self.pruned(ratio), dtype="float32")[0]
        torch.manual_seed(0)
        std = float(getattr(shaped.config, "initializer_range", 0.02))
        with torch.no_grad():
            for parameter in shaped.get_submodule(self.dense.architecture.family.blocks).parameters():
                _ = parameter.normal_(0.0, std) if parameter.dim() > 1 else parameter.fill_(1.0)
        return shaped

    def depth(self, ratio: float) -> Any:
        """Blocks go one by one, each time the one without which the output stays nearest to the dense one's."""
        model = copy.deepcopy(self.dense.model)
        (news,), _ = read_domains("news", self.dense.tokenizer, None, WINDOW, 0)
        ids = torch.cat([news.held_out, news.train])[:DEPTH_WINDOWS]
        target = sum(p.numel() for p in load(self.pruned(ratio))[0].parameters())
        blocks = model.get_submodule(self.dense.architecture.family.blocks)
        with torch.inference_mode():
            expected = self.dense.model(ids, use_cache=False).logits.flatten(0, 1)
        while sum(p.numel() for p in model.parameters()) > target:
            found: list[tuple[float, int]] = []
            layers = list(blocks)
            for index in range(len(layers)):
                _set_blocks(model, blocks, layers[:index] + layers[index + 1 :])
                with torch.inference_mode():
                    logits = model(ids, use_cache=False).logits.flatten(0, 1)
                    found.append((distances(logits, expected, targets_of(ids))[0], index))
            _, worst = min(found)
            _set_blocks(model, blocks, layers[:worst] + layers[worst + 1 :])
        return model


def _point(at: dict[str, Any]) -> dict[str, Any]:
    """Of a curve, as rows keep it."""
    times = {name: of["x_dense"] for name, of in at["figures"].items()}
    return {"step": at["step"], "seconds": at["seconds"], **times}


def _set_blocks(model: Any, blocks: torch.nn.ModuleList, layers: list[torch.nn.Module]) -> None:
    """In place; nothing here caches keys, so that the blocks' own numbers do not matter."""
    while len(blocks):
        del blocks[-1]
    blocks.extend(layers)
    model.config.num_hidden_layers = len(layers)


def render(rows: list[dict[str, Any]]) -> str:
    """Every row that was measured on all texts."""
    head = ["ratio", "start", "trained by", "tokens", "minutes", *TEXTS, "worst", "ARC-Easy", "int8"]
    body = []
    for row in _sorted(rows):
        if not _whole(row):
            continue
        after = [row["after"][name]["x_dense"] for name in TEXTS]
        body.append([*_named(row), *(_pair(row, name) for name in TEXTS), _times(max(after)), _task(row), _int8(row)])
    return table(head, body)


def summary(rows: list[dict[str, Any]]) -> str:
    """WikiText-2 and the worst text, before and after, of the same rows."""
    head = ["ratio", "start", "trained by", "tokens", "minutes", "x dense", "interval", "worst of five", "ARC-Easy",
            "x dense in int8"]  # fmt: skip
    body = []
    for row in _sorted(rows):
        if not _whole(row):
            continue
        low, high = row["after"]["wikitext2"]["x_dense_interval"]
        worst = [_times(max(row[when][name]["x_dense"] for name in TEXTS)) for when in ("before", "after")]
        body.append([
            *_named(row), _pair(row, "wikitext2"), f"{_times(low)}-{_times(high)}", " → ".join(worst), _task(row),
            _int8(row),
        ])  # fmt: skip
    return table(head, body)


def controls(rows: list[dict[str, Any]]) -> str:
    """Rows that were measured on the beginnings of three texts."""
    head = ["ratio", "start", "trained by", "tokens", "minutes", *CURVE]
    found = [row for row in _sorted(rows) if not _whole(row)]
    return table(head, [[*_named(row), *(_pair(row, name) for name in CURVE)] for row in found])


def _whole(row: dict[str, Any]) -> bool:
    return set(TEXTS) <= set(row["after"])


def _sorted(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    order = [row.key.partition("/")[0] for row in wanted("")]
    return sorted(rows, key=lambda row: (row["ratio"], -row["tokens"] // 100_000, order.index(row["start"])))


def _named(row: dict[str, Any]) -> list[str]:
    return [
        f"{row['ratio']:.0%}", STARTS[row["start"]], row["method"], f"{row['tokens'] / 1e3:.0f} k",
        f"{row['seconds'] / 60:.0f}",
    ]  # fmt: skip


def _pair(row: dict[str, Any], name: str) -> str:
    return f"{_times(row['before'][name]['x_dense'])} → {_times(row['after'][name]['x_dense'])}"


def _task(row: dict[str, Any]) -> str:
    return f"{row['arc_easy']['acc']:.1%}" if "arc_easy" in row else "–"


def _int8(row: dict[str, Any]) -> str:
    return _times(row["int8"]["x_dense"]) if "int8" in row else "–"


def draw(rows: list[dict[str, Any]], place: Path) -> None:
    """Perplexity over the time of training, in one picture for rows of all texts and in one for the others."""
    for path, of in ((place, _whole), (place.with_stem(f"{place.stem}-controls"), lambda row: not _whole(row))):
        _draw([row for row in _sorted(rows) if of(row) and row.get("curve")], path)


def _draw(drawn: list[dict[str, Any]], place: Path) -> None:
    """A panel a ratio, a line a row."""
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "slimexport"  # the same bytes for the same figures
    from matplotlib import pyplot

    ratios = sorted({row["ratio"] for row in drawn})
    if not ratios:
        return
    lines = [(row["start"], row["method"]) for row in drawn]
    colours = {line: f"C{i}" for i, line in enumerate(dict.fromkeys(lines))}
    figure, panels = pyplot.subplots(
        2, len(ratios), figsize=(3.4 * len(ratios) + 1, 6), layout="constrained", squeeze=False, sharex="col"
    )
    for column, ratio in enumerate(ratios):
        for axes, text in zip(panels[:, column], ("wikitext2", "articles"), strict=True):
            for row in (row for row in drawn if row["ratio"] == ratio):
                line = (row["start"], row["method"])
                points = [(point["seconds"] / 60, min(point[text], FURTHEST)) for point in row["curve"]]
                axes.plot(*zip(*points, strict=True), marker=".", color=colours[line],
                          label=f"{STARTS[row['start']]}, {row['method']}")  # fmt: skip
            axes.set(title=f"{ratio:.0%}, {TITLES[text]}", ylabel="token perplexity, times dense", yscale="log")
            axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
            axes.grid(alpha=0.3, which="both")
        panels[-1, column].set_xlabel("minutes of training")
    panels[0, 0].legend(fontsize=7)
    place.parent.mkdir(exist_ok=True)
    figure.savefig(place, metadata={"Date": None})
    pyplot.close(figure)


def _times(value: float) -> str:
    return f"{value:.2f}" if value < 100 else f"{value:.0f}" if value < 10_000 else f"{value:.1e}"


if __name__ == "__main__":
    main()
