"""One block while it is pruned: inputs of its output matrices, what stays of them, and what repairs the rest."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from slimexport.architectures.base import Architecture
from slimexport.architectures.family import Kept
from slimexport.architectures.weights import CHANNELS, QUERY
from slimexport.artifacts import BlockSizes, BlockTrace
from slimexport.pruning import factor
from slimexport.pruning.clock import Stopwatch
from slimexport.pruning.coupled import coupled
from slimexport.pruning.criteria import Criterion, Site
from slimexport.pruning.criteria import registry as criteria
from slimexport.pruning.curvature import BlockCurvature, Weighting
from slimexport.pruning.experts import add_ffn_inputs, ffn_matrices
from slimexport.pruning.forward import Arguments, Settings, given_to, inputs_of, known_attention, working_copy
from slimexport.pruning.hessian import Moments, check_finite
from slimexport.pruning.matrices import matrix, set_matrix
from slimexport.pruning.obs import Selection, picked, refit, removal_errors, usual_group_sizes
from slimexport.pruning.shrink import shrink_block
from slimexport.pruning.states import HiddenStates
from slimexport.pruning.targets import Targets
from slimexport.ranks import Message, summed


@dataclass(frozen=True)
class Chosen:
    """What stays of a block's heads or of an expert's channels; errors of plain removal and after compensation, and the
    output's own size: of channels summed over their tokens, as experts see unlike numbers of them."""

    kept: tuple[int, ...]
    W: torch.Tensor  # [out, kept]
    bias: torch.Tensor | None
    before: float
    after: float
    power: float


class Block:
    """One block while it is pruned."""

    def __init__(
        self,
        index: int,
        home: nn.Module,
        states: HiddenStates,
        arguments: Arguments,
        architecture: Architecture,
        keep: BlockSizes,
        criterion: Criterion,
        settings: Settings,
        clock: Stopwatch,
        *,
        targets: Targets | None,
        gradients: Mapping[str, torch.Tensor],
        curvature: BlockCurvature,
    ):
        self.index, self.home, self.states, self.keep = index, home, states, keep
        self.architecture, self.criterion, self.settings, self.clock = architecture, criterion, settings, clock
        self.family, self.dense = architecture.family, architecture.blocks[index]
        self.targets, self.gradients, self.curvature = targets, gradients, curvature
        self._arguments = arguments
        self.kept = Kept.all(self.dense, architecture.experts)
        self.work = working_copy(home, settings)
        self.damping = 0.0
        self.factorised: set[str] = set()
        self.notes: list[str] = []

    def prune(self) -> BlockTrace:
        attention, head_errors = self._prune_heads()
        channel_errors = self._prune_channels(attention)
        return BlockTrace(
            block=self.index,
            query_heads=self.kept.query_heads,
            kv_groups=self.kept.kv_groups,
            channels=self.kept.channels,
            attention_error_before=head_errors[0],
            attention_error=head_errors[1],
            ffn_error_before=channel_errors[0],
            ffn_error=channel_errors[1],
            seconds_forward=0.0,  # the caller's, after the pass through the shrunk block
            seconds_hessian=self.clock.seconds["hessian"],
            seconds_selection=self.clock.seconds["selection"],
            damping=self.damping,
            peak_memory_bytes=0,  # the caller's too
            notes=tuple(self.notes),
            seconds_fit=self.clock.seconds["fit"],
            factorised=",".join(sorted(self.factorised)),
        )

    def _prune_heads(self) -> tuple[HiddenStates | None, tuple[float, float]]:
        """The inputs of the pruned o_proj, per batch, and the errors before and after compensation."""
        whole = (self.keep.kv_groups, self.keep.heads_per_group) == (self.dense.kv_groups, self.dense.heads_per_group)
        if not self.architecture.has_heads or (whole and self.targets is None):
            return None, (0.0, 0.0)
        name = self.family.attention_output
        targets = None if self.targets is None else self.architecture.hidden
        width = self.dense.query_heads * self.architecture.head_dim
        moments = Moments(width, self.settings.device, targets, self.settings.ranks)
        inputs = self.settings.keep()
        project = self.work.get_submodule(name)
        for batch in range(len(self.states)):
            with self.clock.on("forward"):
                states = self.states[batch]
                x = inputs_of(self.work, name, states, self._arguments(self.index, batch))
                inputs.append(x)
            with self.clock.on("hessian"):
                missed = None if self.targets is None else self.targets.attention_lacks(batch, states, project(x))
                moments.add(x, missed)
        with self.clock.on("hessian"):
            H = moments.H()
        with self.clock.on("selection"):
            chosen = self._decided(lambda: self._choose_heads(name, H, moments, whole))
            self.kept = self._with_heads(chosen.kept)
            columns = self._columns_of_heads(self.kept)
            self._shrink(self.family.attention_weight, self.kept, chosen.W, chosen.bias)
            for batch in range(len(inputs)):
                inputs[batch] = picked(inputs[batch], columns)
        return inputs, _shares([chosen])

    def _choose_heads(self, name: str, H: torch.Tensor, moments: Moments, whole: bool) -> Chosen:
        W = self._fitted(name, H, moments, 0, self.targets)
        if whole:
            return Chosen(self.kept.query_heads, W, None, 0.0, 0.0, 1.0)
        selection, used = self.criterion.heads(self._site(self.family.attention_weight, W, H, moments, QUERY))
        self.damping = max(self.damping, used)
        self.factorised |= {selection.factorised} - {""}
        selection = self._with_bias_where_it_can(name, selection)
        columns = self._columns_of_heads(self._with_heads(selection.kept))
        errors = removal_errors(W, selection, columns, H, moments.mean())
        return Chosen(selection.kept, picked(selection.W, columns), selection.bias, *errors)

    def _with_heads(self, query_heads: tuple[int, ...]) -> Kept:
        groups = tuple(sorted({h // self.dense.heads_per_group for h in query_heads}))
        return dataclasses.replace(self.kept, kv_groups=groups, query_heads=query_heads)

    def _columns_of_heads(self, kept: Kept) -> torch.Tensor:
        return torch.tensor(self.architecture.axis_index(QUERY, kept), device=self.settings.device)

    def _decided(self, make: Callable[[], Chosen]) -> Chosen:
        """What the first rank chooses, which has the sums of all."""

        def said() -> Message:
            chosen = make()
            values = {"kept": chosen.kept, "before": chosen.before, "after": chosen.after, "power": chosen.power}
            return Message(values, {"W": chosen.W, **({} if chosen.bias is None else {"bias": chosen.bias})})

        heard = self.settings.ranks.told(said)
        of, tensors = heard.values, heard.tensors
        return Chosen(tuple(of["kept"]), tensors["W"], tensors.get("bias"), of["before"], of["after"], of["power"])

    def _prune_channels(self, attention: HiddenStates | None) -> tuple[float, float]:
        experts = self.family.experts
        whole = self.keep.channels == self.dense.channels
        # Experts are not fitted: what one of them should add is not known apart from what the others do.
        targets = None if experts else self.targets
        if not self.architecture.has_channels or (whole and targets is None):
            return 0.0, 0.0
        name = self.family.ffn_output
        moments = [
            Moments(
                self.dense.channels,
                self.settings.device,
                None if targets is None else self.architecture.hidden,
                self.settings.ranks,
            )
            for _ in range(self.architecture.experts)
        ]
        for batch in range(len(self.states)):
            with self.clock.on("forward"):
                given = self._given_to_down(batch, attention)
            with self.clock.on("hessian"):
                missed = None
                if targets is not None:
                    assert attention is not None
                    missed = self._lacking(batch, attention, targets, given[0])
                add_ffn_inputs(moments, self.work.get_submodule(name), given, missed)
        with self.clock.on("hessian"):
            for of in moments:
                of.H()
        with self.clock.on("selection"):
            chosen = [self._choose_channels(name, expert, of, targets, whole) for expert, of in enumerate(moments)]
            W = torch.stack([c.W for c in chosen]) if experts else chosen[0].W
            numbered = (c + e * self.dense.channels for e, own in enumerate(chosen) for c in own.kept)
            channels = tuple(numbered)
            # Attention was sliced already: its indices are the new ones.
            all_of_it = Kept.all(self.kept.sizes, self.architecture.experts)
            self._shrink(self.family.ffn_weight, dataclasses.replace(all_of_it, channels=channels), W, chosen[0].bias)
            self.kept = dataclasses.replace(self.kept, channels=channels)
        del moments, of  # the fit needs as much
        if targets is not None and self.family.ffn_factors:
            assert attention is not None
            self._fit_factors(attention, targets)
        return _shares(chosen)

    def _choose_channels(
        self, name: str, expert: int, moments: Moments, targets: Targets | None, whole: bool
    ) -> Chosen:
        """What stays of one expert's channels, or of all where there are no experts."""
        H = moments.H()
        return self._decided(lambda: self._choose_channels_by(name, expert, H, moments, targets, whole))

    def _choose_channels_by(
        self, name: str, expert: int, H: torch.Tensor, moments: Moments, targets: Targets | None, whole: bool
    ) -> Chosen:
        W = self._fitted(name, H, moments, expert, targets)
        if whole:
            return Chosen(self.kept.channels, W, None, 0.0, 0.0, 0.0)
        criterion = self.criterion
        if self.family.experts and moments.tokens < self.dense.channels:
            self.notes.append(f"expert {expert} saw {moments.tokens} tokens, it has {self.dense.channels} channels")
            if not moments.tokens:
                criterion = criteria.get("magnitude")  # there is nothing to compensate by
        selection, used = criterion.channels(self._site(self.family.ffn_weight, W, H, moments, CHANNELS, expert))
        self.damping = max(self.damping, used)
        self.factorised |= {selection.factorised} - {""}
        columns = torch.tensor(selection.kept, device=self.settings.device)
        selection = self._with_bias_where_it_can(name, selection)
        errors = removal_errors(W, selection, columns, H, moments.mean())
        return Chosen(
            selection.kept, picked(selection.W, columns), selection.bias, *(moments.tokens * error for error in errors)
        )

    def _fit_factors(self, attention: HiddenStates, targets: Targets) -> None:
        """The projections that make the inputs of down_proj, fitted toward the dense stream once all else is in place.

        The fit takes for linear what is not: it counts where it lowers the error, and is shortened where it does not.
        """
        names, ranks = self.family.ffn_factors, self.settings.ranks
        down = matrix(self.work.get_submodule(self.family.ffn_output)).float()
        pieces: dict[int, factor.Piece] = {}
        batches = self._some_batches(factor.TOKENS)
        for batch in self._own(batches):
            with self.clock.on("forward"):
                x, inputs, slopes = factor.linearised(
                    lambda: self._inputs_of_down(batch, attention),  # noqa: B023
                    [self.work.get_submodule(name) for name in names],
                )
                missed = self._lacking(batch, attention, targets, inputs)
            pieces[batch] = factor.Piece(
                x.flatten(0, -2).float(),
                tuple(slope.flatten(0, -2).float() for slope in slopes),
                missed.flatten(0, -2),
            )
        projections = [self.home.get_submodule(name) for name in names]
        old = [matrix(projection) for projection in projections]
        widths = [W.shape[1] for W in old for _ in range(len(W) // down.shape[1])]
        with self.clock.on("fit"):
            numbers = [batches.index(self._number(batch)) for batch in pieces]
            changes = factor.fit_factors(down, list(pieces.values()), widths, numbers=numbers, ranks=ranks)
        checked = self._own(self._some_batches(factor.CHECKED_TOKENS, batches))
        before = summed(ranks, sum(float(pieces[batch].missed.square().sum()) for batch in checked))
        changes = _joined(changes, [len(W) for W in old])
        for share in factor.SHARES:
            for projection, W, change in zip(projections, old, changes, strict=True):
                set_matrix(projection, (W.to(change) + share * change).to(W))
            self.work = working_copy(self.home, self.settings)
            with self.clock.on("forward"):
                after = sum(
                    float(
                        self._lacking(batch, attention, targets, self._inputs_of_down(batch, attention)).square().sum()
                    )
                    for batch in checked
                )
                after = summed(ranks, after)
            if after < before:
                return
        for projection, W in zip(projections, old, strict=True):
            set_matrix(projection, W)
        self.work = working_copy(self.home, self.settings)
        self.notes.append(f"no fit of {' and '.join(names)} lowered the error")

    def _given_to_down(self, batch: int, attention: HiddenStates | None) -> tuple[torch.Tensor, ...]:
        """What down_proj, or the module of the experts, is given as the block is now; `attention`: the known inputs of
        its o_proj."""
        with known_attention(self.work, self.architecture, attention, batch):
            given = given_to(self.work, self.family.ffn_output, self.states[batch], self._arguments(self.index, batch))
        flat = not self.family.experts and given[0].dim() == 2  # OPT flattens them
        return (given[0].unflatten(0, self.states[batch].shape[:2]),) if flat else given

    def _inputs_of_down(self, batch: int, attention: HiddenStates | None) -> torch.Tensor:
        """[sequences, length, channels]"""
        return self._given_to_down(batch, attention)[0]

    def _lacking(self, batch: int, attention: HiddenStates, targets: Targets, inputs: torch.Tensor) -> torch.Tensor:
        """What the output of down_proj lacks as the block is now, [sequences, length, hidden] float32; `inputs`: its
        own."""
        project, down = (self.work.get_submodule(n) for n in (self.family.attention_output, self.family.ffn_output))
        return targets.ffn_lacks(batch, self.states[batch], project(attention[batch]), down(inputs))

    def _some_batches(self, tokens: int, among: range | None = None) -> range:
        """Numbers of batches, evenly spread over those of all ranks, of so many tokens together at most."""
        among = range(round(summed(self.settings.ranks, len(self.states)))) if among is None else among
        available = summed(
            self.settings.ranks, sum(math.prod(self.states[batch].shape[:2]) for batch in self._own(among))
        )
        return among[:: max(1, math.ceil(available / tokens))]

    def _number(self, batch: int) -> int:
        """Of one of this rank's batches, among those of all: they are dealt out one by one."""
        return self.settings.ranks.rank + batch * self.settings.ranks.size

    def _own(self, numbers: range) -> list[int]:
        """This rank's batches among these."""
        return [batch for batch in range(len(self.states)) if self._number(batch) in numbers]

    def _fitted(
        self, name: str, H: torch.Tensor, moments: Moments, expert: int, targets: Targets | None
    ) -> torch.Tensor:
        """W [out, in] float64, fitted toward the dense stream where there is one."""
        W = ffn_matrices(self.home.get_submodule(name))[expert].to(self.settings.device, torch.float64)
        check_finite(H.diagonal(), self.index, self.settings.dtype)
        return W if targets is None else refit(W, H, moments.C(), self.settings.refit)

    def _site(
        self, weight: str, W: torch.Tensor, H: torch.Tensor, moments: Moments, axis: str, expert: int = 0
    ) -> Site:
        output = self.family.attention_output if axis == QUERY else self.family.ffn_output
        # float64 copies of the largest matrices: only for who looks at them
        wanted = getattr(self.criterion, "needs_gradients", False)
        minded = self.curvature.get(output) if getattr(self.criterion, "weighs_errors", False) else None
        settings = self.settings
        sources, gradients = ({}, {}) if not wanted else coupled(
            self.architecture, self.home, self.gradients, Kept.all(self.kept.sizes), axis, expert, settings.device
        )  # fmt: skip
        start, end = usual_group_sizes(self.dense.channels)
        start = settings.group_size_start or max(start, settings.group_size_end or 1)
        end = settings.group_size_end or min(start, end)
        return Site(
            W=W, H=H, mean=moments.mean(), dense=self.dense, keep=self.keep, head_dim=self.architecture.head_dim,
            group_size_start=start, group_size_end=end,
            damping=settings.damping, name=weight, block=self.index, seed=settings.seed, sources=sources,
            gradients=gradients, weighting=Weighting.of(minded, settings.device),
        )  # fmt: skip

    def _with_bias_where_it_can(self, name: str, selection: Selection) -> Selection:
        """Without what the criterion would put into a bias, where there is none or it may not."""
        if selection.bias is None:
            return selection
        without = dataclasses.replace(selection, bias=None)
        if not self.settings.biases:
            return without
        if any(w.name == f"{name}.bias" for w in self.architecture.block_weights()):
            return selection
        lacks = (
            "weighs biases by the router" if name == self.family.ffn_output and self.family.experts else "has no bias"
        )
        self.notes.append(f"{name} {lacks}: what it would have compensated is lost")
        return without

    def _shrink(self, weight: str, kept: Kept, W: torch.Tensor, bias: torch.Tensor | None) -> None:
        """`W` [out, kept], of experts one for each, becomes the matrix; `bias` [out] is added to its bias."""
        tensors = {weight: W.mT if self.architecture.is_transposed(weight) else W}
        if bias is not None:
            name = f"{weight.removesuffix('.weight')}.bias"
            old = self.home.get_parameter(name).to(self.settings.device, torch.float64)
            tensors[name] = old + bias
        shrink_block(self.home, self.architecture, kept, tensors)
        self.work = working_copy(self.home, self.settings)


def _shares(chosen: Sequence[Chosen]) -> tuple[float, float]:
    """Errors before and after compensation, of all together, as shares of their power."""
    before, after, power = (sum(getattr(c, part) for c in chosen) for part in ("before", "after", "power"))
    return (0.0, 0.0) if power <= 0 else (before / power, after / power)


def _joined(changes: list[torch.Tensor], lengths: list[int]) -> list[torch.Tensor]:
    """The changes of what a fused projection holds, one below the other, so that each has its projection's rows."""
    left, joined = list(changes), []
    for rows in lengths:
        parts = [left.pop(0)]
        while sum(map(len, parts)) < rows:
            parts.append(left.pop(0))
        joined.append(torch.cat(parts))
    return joined
