"""How far a graph's logits and tokens are from what they should be, added up over prompts."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

STEPS = ("prefill", "decode", "chunk", "greedy", "last")


@dataclass(frozen=True)
class Tolerance:
    """Bounds on |logit - torch's logit| in units of the logits' spread: the largest, and the mean of each step."""

    maximum: float
    mean: float


@dataclass(frozen=True)
class GraphRun:
    """What the graph said about the prompt and the tokens it chose itself; `parts` are positions of `logits`."""

    ids: NDArray[np.int64]  # the prompt and all chosen tokens but the last
    logits: NDArray[np.float32]  # [ids, vocab], pieced together from the calls
    chosen: NDArray[np.int64]
    parts: dict[str, slice]
    last: dict[int, NDArray[np.float32]]  # position -> what it said when asked for the last token's logits alone


class Track:
    """Largest and mean |difference| of one kind of step, over prompts."""

    def __init__(self) -> None:
        self.max, self.sum, self.count = 0.0, 0.0, 0

    def add(self, got: NDArray[np.float32], expected: NDArray[np.float32]) -> None:
        if not got.size:
            return
        with np.errstate(invalid="ignore"):
            # Masked vocabulary is -inf in both, and -inf - -inf is NaN.
            difference = np.where(got == expected, 0, np.abs(got - expected))
        self.max = float(np.maximum(self.max, difference.max()))  # keeps a NaN, unlike max()
        self.sum += float(difference.sum(dtype=np.float64))
        self.count += difference.size

    @property
    def mean(self) -> float:
        return self.sum / self.count


class Found:
    """What was found so far, over prompts."""

    def __init__(self, limits: Tolerance, share: float = 0.0) -> None:
        self.limits, self.share = limits, share
        self.tracks = {name: Track() for name in STEPS}
        self.spreads: list[float] = []
        self.checked = 0
        self.ties: list[dict[str, Any]] = []
        self.mismatches: list[dict[str, Any]] = []
        self.strays: list[dict[str, Any]] = []
        self.strayed = 0  # greedy tokens that are another one there

    def add(self, number: int, prompt: int, run: GraphRun, expected: NDArray[np.float32]) -> None:
        """Compares one prompt of `prompt` tokens and its greedy tokens with torch's logits [ids, vocab]."""
        spread = _spread(expected)
        self.spreads.append(spread)
        kept = self._kept(number, run, expected, spread)
        for name, part in run.parts.items():
            self.tracks[name].add(run.logits[part][kept[part]], expected[part][kept[part]])
        for place, row in run.last.items():
            if kept[place]:
                self.tracks["last"].add(row, expected[place])
        choosing = expected[prompt - 1 :]  # the prompt's last position chooses the first token
        self.checked += len(run.chosen)
        for step in np.flatnonzero(run.chosen != choosing.argmax(-1)):
            if not kept[prompt - 1 + step]:
                self.strayed += 1
                continue
            got, wanted = int(run.chosen[step]), int(choosing[step].argmax())
            gap = float(choosing[step, wanted] - choosing[step, got])
            where = {"prompt": number, "step": int(step), "torch": wanted, "onnx": got, "gap": gap}
            (self.ties if gap <= self.limits.maximum * spread else self.mismatches).append(where)

    def _kept(self, number: int, run: GraphRun, expected: NDArray[np.float32], spread: float) -> NDArray[np.bool_]:
        """All positions, but for the worst of those beyond tolerance: up to the share that the decoder may have."""
        kept = np.ones(len(run.ids), bool)
        most = int(self.share * len(run.ids))
        if not most:
            return kept
        off = np.abs(run.logits - expected)
        for place, row in run.last.items():
            off[place] = np.maximum(off[place], np.abs(row - expected[place]))
        mean = off.mean(axis=1)
        beyond = (mean > self.limits.mean * spread) | (off.max(axis=1) > self.limits.maximum * spread)
        for place in [place for place in np.argsort(-mean) if beyond[place]][:most]:
            kept[place] = False
            self.strays.append({"prompt": number, "position": int(place), "mean": float(mean[place])})
        return kept

    @property
    def spread(self) -> float:
        return float(np.mean(self.spreads)) if self.spreads else 0.0

    def result(self) -> dict[str, Any]:
        tracks = {name: track for name, track in self.tracks.items() if track.count}
        total = sum(track.count for track in tracks.values())
        return {
            "logit_spread": self.spread,
            "tolerance": self.limits.maximum * self.spread,
            "tolerance_mean": self.limits.mean * self.spread,
            "steps": {name: {"max": track.max, "mean": track.mean} for name, track in tracks.items()},
            "max_logit_difference": float(np.max([t.max for t in tracks.values()])) if tracks else None,
            "mean_logit_difference": sum(t.sum for t in tracks.values()) / total if total else None,
            "greedy_tokens": self.checked,
            "greedy_equal": self.checked - len(self.ties) - len(self.mismatches) - self.strayed,
            "ties": self.ties,
            "mismatches": self.mismatches,
            **({"strays": self.strays} if self.share else {}),
        }

    def failure(self, precision: str) -> str | None:
        """Which step differs and by how much; None if everything is within the tolerance."""
        largest, mean = self.limits.maximum * self.spread, self.limits.mean * self.spread
        bounds = f"{precision}, logits spread by {self.spread:.3g}"
        for name, track in self.tracks.items():
            if not track.count:
                continue
            # Written so that NaN fails.
            if not track.max <= largest:
                return f"{name} logits differ by up to {track.max:.3g}, tolerance {largest:.3g} ({bounds})."
            if not track.mean <= mean:
                return f"{name} logits differ by {track.mean:.3g} in the mean, tolerance {mean:.3g} ({bounds})."
        if not self.mismatches:
            return None
        first = self.mismatches[0]
        return (
            f"{len(self.mismatches)} greedy tokens differ, first at step {first['step']}: {first['onnx']} instead of "
            f"{first['torch']}, whose logit is larger by {first['gap']:.3g}, tolerance {largest:.3g}."
        )


def _spread(logits: NDArray[np.float32]) -> float:
    """Standard deviation over the vocabulary, averaged over positions; what all logits share does not count."""
    finite = np.where(np.isfinite(logits), logits, np.nan)
    return float(np.nanstd(finite, axis=-1, dtype=np.float64).mean())
