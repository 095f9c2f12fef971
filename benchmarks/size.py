"""What to do for a smaller file: prune, quantise, or both. Bytes on disk on one axis, perplexity on the other.

    python benchmarks/quality.py ... --only mix --keep KEPT      # keeps the pruned models
    python benchmarks/size.py --data DATA --work DIR KEPT/*      # measures; takes up what was interrupted
    python benchmarks/size.py --render                           # table and docs/size.svg, from the JSON alone

The dense model and every pruned one are exported in every precision, as `slimexport run --precision` does. Bytes are
those of the model as it is. What the perplexity of a quantised graph is taken of is the same model off the 4-bit grid
that the demo model's weights lie on (offgrid.py), or quantising the dense model would look free. Everything is measured
in ONNX Runtime, on the first tokens of WikiText-2's test split.

pip install matplotlib
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any

from common import RESULTS, load_rows, save_rows, table

PICTURE = Path(__file__).parent.parent / "docs" / "size.svg"
PRECISIONS = ("fp32", "int8", "int4-mixed", "int4")
DENSE = "dense"
GRAPH, WEIGHTS = "model.onnx", "model.onnx.data"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoints", nargs="*", type=Path, help="directories that quality.py --keep has written")
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--work", type=Path, help="for the graphs, one at a time")
    parser.add_argument("--tokens", type=int, default=20_000)
    parser.add_argument("--out", type=Path, default=RESULTS / "size.json")
    parser.add_argument("--picture", type=Path, default=PICTURE)
    parser.add_argument("--render", action="store_true")
    options = parser.parse_args()
    rows = load_rows(options.out)
    if not options.render:
        measure(options, rows)
    draw(rows, options.picture)
    print(render(rows))


def measure(options: argparse.Namespace, rows: list[dict[str, Any]]) -> None:
    from texts import evaluation_texts

    from slimexport.checkpoint import load
    from slimexport.config import RunConfig
    from slimexport.loading import load_model

    dense = load_model(RunConfig(model=options.model))
    ids = evaluation_texts(dense.tokenizer, options.data)["wikitext2"][: options.tokens].numpy()
    for name in (DENSE, *(str(path) for path in options.checkpoints)):
        same = [row for row in rows if row["name"] == Path(name).name and row["tokens"] == len(ids)]
        known = {row["precision"] for row in same}
        if known.issuperset(PRECISIONS):
            continue
        model = dense.model if name == DENSE else load(name)[0]
        for precision in (p for p in PRECISIONS if p not in known):
            size, nll = exported(copy.deepcopy(model), dense.tokenizer, options.work, precision, ids)
            row = {"name": Path(name).name, "precision": precision, "bytes": size, "nll": nll, "tokens": len(ids)}
            print(row, flush=True)
            rows.append(row)
            save_rows(options.out, rows)


def exported(model: Any, tokenizer: Any, work: Path, precision: str, ids: Any) -> tuple[int, float]:
    """Bytes of the graph with its weights, and the mean NLL of the same off the grid; the weights are rounded by the
    text that `slimexport run` takes by default."""
    from offgrid import off_grid

    from slimexport.artifacts import staged_directory
    from slimexport.calibration import rounding_windows
    from slimexport.config import RunConfig
    from slimexport.runtime import OnnxDecoder
    from slimexport.targets import registry
    from slimexport.targets.base import ExportOptions
    from slimexport.verification.perplexity import accuracy

    place = work / "onnx"

    def export(of: Any, text: Any = None) -> None:
        with staged_directory(place) as partial:
            registry.get("onnx").export(of, tokenizer, partial, ExportOptions(precision=precision, text=text))

    export(model.float())  # its size is the same however weights are rounded
    size = sum((place / file).stat().st_size for file in (GRAPH, WEIGHTS))
    if precision != PRECISIONS[0]:
        export(off_grid(model), rounding_windows(RunConfig(model="any"), tokenizer))
    return size, accuracy(OnnxDecoder(place), None, ids).mean_nll


def points(rows: list[dict[str, Any]]) -> list[tuple[str, str, float, float]]:
    """(what, precision, MB, times the dense float32 perplexity), the models in turn."""
    import math

    dense = next(row["nll"] for row in rows if (row["name"], row["precision"]) == (DENSE, PRECISIONS[0]))
    names = list(dict.fromkeys(row["name"] for row in rows))
    of = sorted(rows, key=lambda row: (names.index(row["name"]), PRECISIONS.index(row["precision"])))
    return [(_label(r["name"]), r["precision"], r["bytes"] / 1e6, math.exp(r["nll"] - dense)) for r in of]


def _label(name: str) -> str:
    """`ours_slimexport_0.3_main_128` -> `ours 30%`."""
    parts = name.split("_")
    return name if name == DENSE else f"{parts[0]} {float(parts[-3]):.0%}"


def render(rows: list[dict[str, Any]]) -> str:
    found = points(rows)
    return table(["model", "weights", "MB", "x dense"], [[a, b, f"{c:.0f}", f"{d:.2f}"] for a, b, c, d in found])


def draw(rows: list[dict[str, Any]], place: Path) -> None:
    import matplotlib as mpl

    mpl.use("svg")
    mpl.rcParams["svg.hashsalt"] = "slimexport"  # the same bytes for the same figures
    from matplotlib import pyplot

    found = points(rows)
    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    for precision, marker in zip(PRECISIONS, "os^v", strict=True):
        line = sorted((mb, ratio, what) for what, p, mb, ratio in found if p == precision)
        axes.plot([p[0] for p in line], [p[1] for p in line], marker=marker, label=precision)
        for mb, ratio, what in line:
            left = precision == PRECISIONS[-1]  # there is another point on its right
            place_of, side = ((-6, -3), "right") if left else ((6, -3), "left")
            axes.annotate(what, (mb, ratio), xytext=place_of, textcoords="offset points", fontsize=8, ha=side)
    axes.set(xlabel="model.onnx with its weights, MB", ylabel="token perplexity, times dense fp32")
    axes.set(xscale="log", yscale="log", xlim=(40, 800))
    axes.set_xticks([50, 100, 200, 400, 800], minor=False)
    axes.xaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.xaxis.set_minor_formatter(mpl.ticker.NullFormatter())
    axes.yaxis.set_major_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.yaxis.set_minor_formatter(mpl.ticker.FormatStrFormatter("%g"))
    axes.grid(alpha=0.3, which="both")
    axes.legend(title="weights")
    place.parent.mkdir(exist_ok=True)
    figure.savefig(place, metadata={"Date": None})


if __name__ == "__main__":
    main()
