"""The quality table: every criterion and allocation, ours and others', on natural and shifted text; no training.

    python benchmarks/quality.py --data DATA --work /tmp/quality [--only ours,peers] [--texts wikitext2] [--device cuda]
    python benchmarks/quality.py --render      # the tables, from the JSON alone

DATA holds `wikitext2/` and `arc/` (see texts.py). One row is one pruned model, through the same engine, plan, legality
and calibration, in float32. Rows and columns that are in the JSON already are not measured again, so that the table can
be made in pieces; columns that are added later prune again, unless the models were kept (--keep).

The protocol of the main rows: 128 x 512 tokens of calibration.txt (nearly all of it, so there is no seed spread), the
first 60,000 tokens of wiki.test.txt, windows of 512 without overlap. `ours` is what `slimexport run` does by default,
but for the calibration text; `mix` is `slimexport run` as it is. The rows that compare criteria and allocations, and
those on the calibration text, are many: they have less text (`COMPARED`, `PART`), all of them the same.
"""

from __future__ import annotations

import argparse
import copy
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from accuracy import BATCH, Reference, evaluate, kept_reference
from common import RESULTS, load_rows, save_rows, table
from texts import WINDOW, calibration_windows, evaluation_texts

from slimexport.artifacts import CalibrationSet, CostTable, TextSource, from_dict, read_json, staged_directory
from slimexport.checkpoint import load
from slimexport.config import RunConfig
from slimexport.environment import environment, peak_memory_bytes
from slimexport.loading import LoadedModel, load_model
from slimexport.progress import Progress
from slimexport.run_directory import COSTS, WORK

RATIOS = (0.2, 0.3, 0.5)
CRITERIA = ("slimgpt", "fasp", "flap", "wanda_sp", "taylor", "taylor_lora", "magnitude", "random")
PAPER = {"refit": 0.0, "curvature_tokens": 0}  # what we add to slimgpt, left out
CALIBRATIONS = ("seeds", "sizes", "sources", "lengths")  # groups of rows that differ in the text alone
COMPARED = ("criteria", "allocations")
COMPARED_WINDOWS = 16
PART = {"wikitext2": 10, "articles": 3, "arc": 3}  # windows that rows of COMPARED and CALIBRATIONS are measured on
TAYLOR: dict[str, Any] = {"peer": "torch_pruning", "importance": "taylor"}
PEERS: dict[str, Callable[[float], dict[str, Any]]] = {  # with the settings that did best on development text
    "torch-pruning taylor": lambda ratio: TAYLOR | ({"protected": (4, 2)} if ratio < 0.5 else {"ranking": "global"}),
    "torch-pruning magnitude": lambda ratio: {"peer": "torch_pruning", "importance": "magnitude"},
    "optipfair": lambda ratio: {"peer": "optipfair"},
}
SHIFTED = ("articles", "arc", "news", "wikitext2-raw")


@dataclass(frozen=True)
class Row:
    """One pruned model. `options` are fields of RunConfig; `calibration` is main, seed-N, default, or a value of
    --calibration; `windows` of it have `length` tokens each."""

    group: str
    name: str
    ratio: float
    calibration: str = "main"
    windows: int = 128
    options: dict[str, Any] = field(default_factory=dict)
    peer: dict[str, Any] = field(default_factory=dict)
    length: int = WINDOW

    @property
    def part(self) -> bool:
        """Whether it is measured on parts of the texts."""
        return self.group in COMPARED + CALIBRATIONS

    @property
    def key(self) -> str:
        length = f"x{self.length}" if self.length != WINDOW else ""
        return f"{self.group}/{self.name}/{self.ratio:g}/{self.calibration}/{self.windows}{length}"


def wanted() -> Iterator[Row]:
    """All rows of the table, the most telling first."""
    yield Row("dense", "dense", 0.0, windows=0)
    for ratio in RATIOS:
        yield Row("ours", "slimexport", ratio)
    for ratio in RATIOS:
        yield Row("mix", "slimexport", ratio, calibration="default")
    for ratio in RATIOS:
        yield Row("fast", "slimexport --fast", ratio, options={"fast": True})
    for name, settings in PEERS.items():
        for ratio in RATIOS:
            yield Row("peers", name, ratio, peer=settings(ratio))
    few = {"windows": COMPARED_WINDOWS}
    for allocation in ("incremental", "uniform"):
        for criterion in CRITERIA:
            for ratio in RATIOS:
                options = {"criterion": criterion, "allocation": allocation, **PAPER}
                yield Row("criteria", f"{criterion}, {allocation}", ratio, options=options, **few)
    for allocation in ("arithmetic", "sensitivity", "search"):
        for ratio in RATIOS:
            yield Row("allocations", allocation, ratio, options={"allocation": allocation, **PAPER}, **few)
    fast: dict[str, Any] = {"options": {"fast": True}}
    for seed in (0, 1, 2):
        yield Row("seeds", "slimexport --fast", 0.3, calibration=f"seed-{seed}", windows=64, **fast)
    for windows in (16, 32, 64, 128):
        yield Row("sizes", "slimexport --fast", 0.3, windows=windows, **fast)
    for source in ("default", "wikipedia", "self"):
        yield Row("sources", "slimexport --fast", 0.3, calibration=source, windows=32, **fast)
    for length in (128, 1024):
        yield Row("lengths", "slimexport --fast", 0.3, windows=32 * WINDOW // length, length=length, **fast)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="keeps what the dense model says and the costs")
    parser.add_argument("--only", help="groups, or parts of row names, joined by commas")
    parser.add_argument("--ratios", default="0.2,0.3,0.5")
    parser.add_argument("--texts", default=",".join(("wikitext2", *SHIFTED)))
    parser.add_argument("--arc-easy", action="store_true", help="also the task, through lm-eval")
    parser.add_argument("--keep", type=Path, help="keeps the pruned models, for columns that are measured later")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--device", default="cpu", help="cuda: pruning and evaluation there, in float32 as on the CPU")
    parser.add_argument("--out", type=Path, default=RESULTS / "quality.json")
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        if options.threads:
            torch.set_num_threads(options.threads)
        Bench(options, rows).run()
    print(render(rows))


class Bench:
    def __init__(self, options: argparse.Namespace, rows: list[dict[str, Any]]):
        self.options, self.rows = options, rows
        options.work.mkdir(parents=True, exist_ok=True)
        self.loaded: LoadedModel = load_model(RunConfig(model=options.model))
        self.device = torch.device(options.device)
        # The dense model where it is measured; what is pruned starts on the CPU, as in the product.
        on_cpu = self.device.type == "cpu"
        self.dense = self.loaded.model if on_cpu else copy.deepcopy(self.loaded.model).to(self.device)
        torch.backends.cuda.matmul.allow_tf32 = False
        self.texts = evaluation_texts(self.loaded.tokenizer, options.data)
        self.references: dict[str, Reference] = {}

    def run(self) -> None:
        ratios = [float(r) for r in self.options.ratios.split(",")]
        names = self.options.texts.split(",")
        only = self.options.only.split(",") if self.options.only else None
        for row in wanted():
            if row.ratio not in (*ratios, 0.0) or (only and not any(o == row.group or o in row.name for o in only)):
                continue
            record = next((r for r in self.rows if r["key"] == row.key), None)
            asked = [n for n in names if row.ratio and (n in PART or not row.part)]
            missing = [n for n in asked if n not in (record or {}).get("texts", {})]
            task = self.options.arc_easy and "arc_easy" not in (record or {})
            if not missing and not task:
                continue
            model, facts = self.pruned(row, again=record is not None)
            if record is None:
                record = {"key": row.key, **asdict(row), **facts, "device": self.device_name(), "texts": {}}
                self.rows.append(record)
            model = model.to(self.device)
            for name in missing:
                started = time.monotonic()
                found = evaluate(model, *self.beside(name, row.part), batch=self.batch())
                record["texts"][name] = {**found, "seconds": time.monotonic() - started}
                save_rows(self.options.out, self.rows)
                print(row.key, name, round(found["x_dense"], 3), flush=True)
            if task:
                record["arc_easy"] = self.task(model)
                save_rows(self.options.out, self.rows)

    def device_name(self) -> str:
        return torch.cuda.get_device_name() if self.device.type == "cuda" else str(environment()["cpu"])

    def batch(self) -> int:
        """Windows in one forward pass."""
        return BATCH if self.device.type == "cpu" else 32

    def pruned(self, row: Row, again: bool) -> tuple[Any, dict[str, Any]]:
        """The pruned model, and how it came about (nothing, where it was kept `again` is true)."""
        place = self.options.keep and self.options.keep / row.key.replace("/", "_").replace(" ", "-")
        if again and place and place.is_dir():
            return load(place)[0], {}
        model, facts = self.prune(row)
        if place and not row.peer:
            with staged_directory(place) as partial:
                model.save_pretrained(str(partial))
                self.loaded.tokenizer.save_pretrained(str(partial))
        return model, facts

    def prune(self, row: Row) -> tuple[Any, dict[str, Any]]:
        """The pruned model, and how it came about."""
        if not row.ratio:
            return self.dense, {}
        calibration = self.calibration(row)
        dense_pass = self.dense_pass(calibration.input_ids)
        started = time.monotonic()
        if row.peer:
            from peers import pruned

            ids = calibration.input_ids.to(self.device)
            model = pruned(model=self.dense, calibration_ids=ids, ratio=row.ratio, **row.peer)
            seconds = {"all": time.monotonic() - started}
            return model, {"seconds": seconds, "dense_pass": dense_pass, "reached": None, "blocks": None}
        from slimexport.pruning import allocation as allocations
        from slimexport.pruning.stage import curvature_of, prepare, prune_model
        from slimexport.stages.plan import measured_plan, plan_stage

        config = RunConfig(
            model=self.options.model,
            ratio=row.ratio,
            calibration_tokens=calibration.input_ids.numel(),
            sequence_length=row.length,
            device=self.options.device,
            **row.options,
        )
        begun = time.monotonic()
        spent, curvature = 0.0, curvature_of(self.loaded, calibration, config)
        weighing = time.monotonic() - begun
        allocation = allocations.registry.get(config.resolved_allocation)
        if allocations.needs_costs(allocation):
            # Costs and supernet are measured once for all ratios and found again; a search is one for each.
            place = self.options.work / f"costs-{calibration.source.sha256[:16]}"
            place.mkdir(exist_ok=True)
            (place / WORK / "search.json").unlink(missing_ok=True)
            complete = not allocations.searches(allocation) or (place / WORK / "supernet").is_dir()
            known, begun = _measuring_seconds(place / COSTS), time.monotonic()
            plan = measured_plan(place, self.loaded, calibration, config, Progress(quiet=True), curvature)
            measured = _measuring_seconds(place / COSTS)
            spent = time.monotonic() - begun + (measured if measured == known and complete else 0.0)
        else:
            plan = plan_stage(config, self.loaded.architecture, "float32")
        copied = prepare(replace(self.loaded, model=copy.deepcopy(self.loaded.model)), config)
        made = prune_model(copied, plan, calibration, config, curvature=curvature)
        seconds = {
            "curvature": weighing,
            "allocation": spent,
            "forward": sum(t.seconds_forward for t in made.trace),
            "hessian": sum(t.seconds_hessian for t in made.trace),
            "selection": sum(t.seconds_selection for t in made.trace),
            "fit": sum(t.seconds_fit for t in made.trace),
            "all": time.monotonic() - started,
        }
        return made.model, {
            "seconds": seconds,
            "dense_pass": dense_pass,
            "peak_memory_bytes": peak_memory_bytes(),
            "reached": plan.ratio,
            "parameters": plan.estimates.parameters,
            "blocks": [[b.kv_groups, b.heads_per_group, b.channels] for b in plan.blocks],
            "text": {"name": Path(calibration.source.name).name, "sha256": calibration.source.sha256},
        }

    @torch.inference_mode()
    def dense_pass(self, ids: torch.Tensor) -> float:
        """Seconds of one pass of the dense decoder over `ids`, from an eighth of them: what a row's time is held to,
        so that rows of different machines and thread counts can be compared."""
        part = ids[: max(1, len(ids) // 8)].to(self.device)
        decoder = self.dense.get_decoder()
        decoder(part[:1], use_cache=False)[0].sum().item()  # waits for the device
        started = time.monotonic()
        for batch in part.split(8):
            decoder(batch, use_cache=False)[0].sum().item()
        return (time.monotonic() - started) * len(ids) / len(part)

    def calibration(self, row: Row) -> CalibrationSet:
        seed = int(row.calibration.removeprefix("seed-")) if row.calibration.startswith("seed-") else None
        if row.calibration != "main" and seed is None:
            from slimexport.calibration import calibrate

            named = {} if row.calibration == "default" else {"calibration": row.calibration}
            tokens = {"calibration_tokens": row.windows * row.length, "sequence_length": row.length}
            config = RunConfig(model=self.options.model, **named, **tokens)
            return calibrate(config, self.loaded.tokenizer, self.loaded.model)
        windows = row.windows * row.length // WINDOW
        ids = calibration_windows(self.loaded.tokenizer, self.options.data, seed=seed, windows=windows)
        ids = ids.reshape(-1, row.length)  # the windows follow each other in the text
        import hashlib

        digest = hashlib.sha256(ids.numpy().tobytes()).hexdigest()
        return CalibrationSet(ids, TextSource("calibration.txt", ids.numel(), digest), seed or 0)

    def beside(self, name: str, part: bool) -> tuple[torch.Tensor, int, Reference]:
        """A text, or its part, the length of its windows, and what the dense model says to it."""
        ids, key = self.texts[name], name
        if part:  # from all over the text: its first windows may be one odd article
            windows = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
            taken = torch.arange(PART[name]) * len(windows) // PART[name]
            ids, key = windows[taken].reshape(-1), f"{name}-{PART[name]}"
        if key not in self.references:
            path = self.options.work / f"dense-{key}.safetensors"
            self.references[key] = kept_reference(path, self.dense, ids, self.batch())
        return ids, WINDOW, self.references[key]

    def task(self, model: Any) -> dict[str, Any]:
        from tasks import arc_easy

        return arc_easy(model, self.loaded.tokenizer, self.options.data / "arc" / "arc_easy_validation.jsonl")


def _measuring_seconds(costs: Path) -> float:
    """What the cost table in this file took to measure; 0 where there is none yet."""
    return from_dict(CostTable, read_json(costs), str(costs)).seconds if costs.is_file() else 0.0


HEAD = ["method", "calibration", "wiki", "KL", "top-1", *SHIFTED, "worst", "mean", "ARC-Easy", "passes", "GB"]

PART_HEAD = [name for name in HEAD if name in ("method", "calibration", "wiki", "KL", "top-1", *PART)]


def render(rows: list[dict[str, Any]]) -> str:
    """One table a ratio: everything that was measured of ours and of other tools."""
    return _by_ratio([row for row in rows if row["group"] not in COMPARED + CALIBRATIONS])


def compared(rows: list[dict[str, Any]]) -> str:
    """One table a ratio: criteria and allocations of this engine, on less text."""
    return _by_ratio([row for row in rows if row["group"] in COMPARED], PART_HEAD)


def _by_ratio(rows: list[dict[str, Any]], head: list[str] = HEAD) -> str:
    parts = []
    for ratio in RATIOS:
        of_ratio = [row for row in _in_order(rows) if row["ratio"] == ratio]
        body = [_cells(row) for row in of_ratio if "wikitext2" in row["texts"]]
        dense = next((row for row in rows if row["group"] == "dense" and "arc_easy" in row), None)
        if body and dense:
            cells = dict.fromkeys(HEAD, "–") | {"method": "dense", "wiki": "1.00", "ARC-Easy": _task(dense)}
            body.insert(0, list(cells.values()))
        made = table(head, [_only(head, cells) for cells in body])
        parts.append(f"{ratio:.0%} removed:\n\n{made}" if body else f"{ratio:.0%}: no rows yet")
    return "\n\n".join(parts)


def calibrations(rows: list[dict[str, Any]]) -> str:
    """What the calibration text does: its draw, size, source, and the length of its windows; 30 % removed."""
    of = [row for row in _in_order(rows) if row["group"] in CALIBRATIONS and "wikitext2" in row["texts"]]
    return table(PART_HEAD, [_only(PART_HEAD, _cells(row)) for row in of])


def _only(head: list[str], cells: list[str]) -> list[str]:
    return [cell for name, cell in zip(HEAD, cells, strict=True) if name in head]


def summary(rows: list[dict[str, Any]]) -> str:
    """The rows that a user chooses between: ours by default, fast, and other tools."""
    body = []
    for row in _in_order(rows):
        wiki = row["texts"].get("wikitext2")
        if row["group"] not in ("ours", "mix", "fast", "peers") or wiki is None:
            continue
        low, high = wiki["x_dense_interval"]
        body.append([
            f"{row['ratio']:.0%}", _method(row), f"{row['parameters'] / 1e6:.1f} M" if "parameters" in row else "",
            f"{wiki['perplexity']:.2f}", f"{wiki['x_dense']:.2f}", f"{low:.2f}-{high:.2f}", f"{wiki['kl']:.3f}",
            f"{wiki['top1_agreement']:.1%}", _spread(row)[0],
        ])  # fmt: skip
    body.sort(key=lambda cells: cells[0])  # stable: the order of methods stays
    head = ["ratio", "method", "parameters", "perplexity", "x dense", "interval", "KL", "same top-1", "worst of five"]
    return table(head, body)


def _in_order(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    places = {row.key: place for place, row in enumerate(wanted())}
    return sorted((row for row in rows if row["key"] in places), key=lambda row: places[row["key"]])


def _method(row: dict[str, Any]) -> str:
    name = f"slimgpt, {row['name']}" if row["group"] == "allocations" else row["name"]
    if row["group"] == "fast":
        name += " (slimgpt, incremental)"
    return f"{name}, default calibration" if row["group"] == "mix" else name


def _spread(row: dict[str, Any]) -> tuple[str, str]:
    """The worst of all texts and their geometric mean, as ratios to the dense model."""
    if not all(text in row["texts"] for text in SHIFTED):
        return "–", "–"
    found = [text["x_dense"] for text in row["texts"].values()]
    return f"{max(found):.2f}", f"{math.exp(sum(map(math.log, found)) / len(found)):.2f}"


def _task(row: dict[str, Any]) -> str:
    """Accuracy by the likelihood of the whole answer, and by that of a character."""
    return f"{row['arc_easy']['acc']:.1%} / {row['arc_easy']['acc_norm']:.1%}" if "arc_easy" in row else "–"


def _cells(row: dict[str, Any]) -> list[str]:
    texts, seconds = row["texts"], row["seconds"]
    wiki = texts["wikitext2"]
    spent = sum(s for part, s in seconds.items() if part != "all") or seconds["all"]
    text = f"{row['calibration']}, {row['windows']} x {row.get('length', WINDOW)}"
    return [
        _method(row), text, f"{wiki['x_dense']:.2f}", f"{wiki['kl']:.3f}",
        f"{wiki['top1_agreement']:.1%}", *(f"{texts[t]['x_dense']:.2f}" if t in texts else "–" for t in SHIFTED),
        *_spread(row), _task(row),
        f"{spent / row['dense_pass']:.1f}" if row.get("dense_pass") else "–",
        f"{row['peak_memory_bytes'] / 1e9:.1f}" if row.get("peak_memory_bytes") else "–",
    ]  # fmt: skip


if __name__ == "__main__":
    main()
