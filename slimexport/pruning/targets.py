"""What a block that is pruned is fitted toward: the dense stream that runs beside it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from slimexport.pruning.states import HiddenStates

SINK = 8.0  # times the median size of the residual: above it a token is an attention sink


@dataclass
class Targets:
    """What the two output matrices give in the dense stream of this block, per batch, and what it was before.

    `multiplier`: of what they add to the residual; `normed`: a norm stands between them and it, so that a matrix is
    fitted toward what the same one gives in the dense stream, and not toward what the residual lacks.
    """

    before: HiddenStates
    attention: HiddenStates
    ffn: HiddenStates
    multiplier: float = 1.0
    normed: bool = False

    def attention_lacks(self, batch: int, states: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """What o_proj, which gives `given`, lacks to make the residual after it what it is in the dense stream, or to
        give what it gives there. `states` before the block; all [sequences, length, hidden]."""
        if self.normed:
            return _missed(self.attention[batch], given)
        wanted = self.before[batch] + self.multiplier * self.attention[batch]
        return _missed(wanted, states + self.multiplier * given) / self.multiplier

    def ffn_lacks(self, batch: int, states: torch.Tensor, attention: torch.Tensor, given: torch.Tensor) -> torch.Tensor:
        """The same of down_proj, float32; `attention` is what o_proj gives now."""
        if self.normed:
            return _missed(self.ffn[batch], given).float()
        wanted = self.before[batch] + self.multiplier * self.attention[batch] + self.multiplier * self.ffn[batch]
        found = states + self.multiplier * attention + self.multiplier * given
        return _missed(wanted, found).float() / self.multiplier


def _missed(wanted: torch.Tensor, found: torch.Tensor) -> torch.Tensor:
    """What the pruned stream lacks to be the dense one, [sequences, length, hidden]; nothing at attention sinks.

    The residual of a first token is a hundred times that of the others in many models: its error would be all that
    the least squares see. With nothing to mend there, they leave what W gives as it is.
    """
    sizes = torch.stack([wanted, found]).float().square().mean(-1).amax(0).sqrt()
    return (wanted - found).masked_fill((sizes > SINK * sizes.median()).unsqueeze(-1), 0.0)
