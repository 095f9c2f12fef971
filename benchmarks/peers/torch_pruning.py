"""torch-pruning (arXiv 2301.12900) through its public API, by its magnitude and Taylor importance.

pip install --no-deps torch-pruning==1.6.1
"""

from __future__ import annotations

import copy
from typing import Any, Literal

import torch

from peers import TOLERANCE, block_linears, block_parameters
from slimexport.errors import BadInputError

EXAMPLE_TOKENS = 4  # for tracing: the graph does not depend on them


def torch_pruning(
    model: Any,
    calibration_ids: torch.Tensor,
    ratio: float,
    importance: Literal["magnitude", "taylor"],
    *,
    ranking: Literal["local", "global"] = "local",
    protected: tuple[int, int] = (0, 0),
    heads_per_group: int = 0,
) -> Any:
    """A smaller copy of `model` (Llama modules, float32), by torch-pruning's own pruner and importance.

    The share of the block linear parameters that goes is `ratio` within half a percent point: `heads_per_group` query
    heads leave every KV group of the blocks that are not protected, the FFN channels make up the rest. The library has
    no recipe for this, so its settings are arguments, to be chosen on development text as our own are. What they did
    there (SmolLM2-135M, Taylor over 4 windows, perplexity over dense on 1,022 tokens; an indication, no result):

                                                        20 %    30 %    50 %
        defaults: each block's channels ranked apart    1.92    3.92      40
        protected=(4, 2)                                1.74    2.65      45
        ranking="global"                                1.91    3.02      24
        both                                               -    3.15      61
        heads_per_group=1                                  -    10.8      48

    - `ranking`: channels of each block ranked apart (as its LLM example does), or of all blocks together; then the raw
      scores are compared, because its default normalisation makes every block as important as every other. A block
      that would lose all its channels is left whole by the library, and the ratio then missed.
    - `protected`: that many blocks at the beginning and at the end lose nothing; (4, 2) is what LLM-Pruner, which
      shares an author, does to a Llama.
    - `heads_per_group`: 0 or 1 for SmolLM2.

    `calibration_ids` int64 [n, w] is what the gradients of `taylor` are summed over, a window at a time (three forward
    passes each; LLM-Pruner takes ten short samples); `magnitude` reads no text. With local ranking and nothing
    protected all blocks end equal and the config describes them; otherwise the model runs, but cannot be saved as a
    plain Llama.

    What torch-pruning 1.6.1 can do here: trace the model with transformers' eager attention, leave the residual alone
    (`ignored_layers`), follow key/value heads through their repetition, and take the same number of query heads from
    every KV group. What it cannot:
    - trace `sdpa` attention with grouped heads: it takes the 3 KV heads for 9 and stops with a shape error;
    - remove a KV group: k_proj and v_proj are put aside under GQA, and not scored either (heads are ranked by q_proj
      and o_proj alone);
    - leave as many query heads as KV groups: it then takes the block for multi-head attention, wants to cut all of
      k_proj and v_proj, and its own check drops the step without a word. Of 3 query heads a group, 1 can go, 2 cannot;
    - compensate: what stays keeps its weights;
    - count parameters, or change the config and the attention's head counts: done here, as its example does it.

    Raises BadInputError where torch-pruning is missing, the model is of another kind, or the ratio cannot be met.
    """
    if importance not in ("magnitude", "taylor") or ranking not in ("local", "global"):
        raise BadInputError(f"Neither magnitude nor taylor, or neither local nor global: {importance!r}, {ranking!r}.")
    tp = _library()
    if model.config.model_type != "llama" or model.config.is_heterogeneous:
        raise BadInputError("This peer is set up for a dense Llama.")
    small = copy.deepcopy(model).float().eval()
    before, blocks = block_parameters(small), list(small.model.layers)
    open_blocks = blocks[protected[0] : len(blocks) - protected[1]]
    implementation = small.config._attn_implementation
    if importance == "taylor":
        _accumulate_gradients(small, calibration_ids)
    small.set_attn_implementation("eager")
    small.requires_grad_(True)  # it traces by autograd
    if heads_per_group:
        _prune_heads(tp, small, _scorer(tp, importance, "local"), open_blocks, heads_per_group)
    wanted = ratio * before - (before - block_parameters(small))
    _prune_channels(tp, small, _scorer(tp, importance, ranking), open_blocks, wanted, ranking)
    small.zero_grad(set_to_none=True)
    small.requires_grad_(False)
    small.set_attn_implementation(implementation)
    _write_sizes(small)
    reached = 1 - block_parameters(small) / before
    if abs(reached - ratio) > TOLERANCE:
        raise BadInputError(f"torch-pruning removed {reached:.2%} of the block linear parameters, {ratio:.2%} wanted.")
    return small


def _library() -> Any:
    try:
        import torch_pruning
    except ImportError:
        raise BadInputError("This peer needs: pip install --no-deps torch-pruning==1.6.1") from None
    return torch_pruning


def _scorer(tp: Any, importance: str, ranking: str) -> Any:
    kinds = {"magnitude": tp.importance.GroupMagnitudeImportance, "taylor": tp.importance.GroupTaylorImportance}
    return kinds[importance]() if ranking == "local" else kinds[importance](normalizer=None)


def _accumulate_gradients(model: Any, calibration_ids: torch.Tensor) -> None:
    """Fills `weight.grad` of the block linear layers: of a window's mean NLL, summed over the windows of [n, w]."""
    model.requires_grad_(False)
    for linear in block_linears(model):
        linear.weight.requires_grad_(True)
    for window in calibration_ids:
        ids = window[None].to(model.device)
        model(ids, labels=ids, use_cache=False).loss.backward()


# --------------------------------------------------------------------------------------------- torch-pruning's pruner


def _prune_heads(tp: Any, model: Any, scorer: Any, blocks: list[Any], removed: int) -> None:
    """Takes `removed` query heads from every KV group of `blocks`."""
    config = model.config
    query, kv = config.num_attention_heads, config.num_key_value_heads
    if not 0 < removed < query // kv - 1:
        raise BadInputError(f"torch-pruning can take 0 to {query // kv - 2} query heads a KV group, not {removed}.")
    num_heads: dict[Any, int] = {}
    for block in blocks:
        attention = block.self_attn
        num_heads |= {attention.q_proj: query, attention.k_proj: kv, attention.v_proj: kv}
    prunable = [block.self_attn for block in blocks]
    _step(
        tp, model, scorer, prunable,
        num_heads=num_heads,
        prune_num_heads=True,
        prune_head_dims=False,  # they would cut the rotary embedding
        pruning_ratio=1e-9,  # of head dimensions, not used; but at 0 it does not look at the heads
        # It removes ceil(heads * ratio) heads, then the same number, rounded up, from every KV group.
        head_pruning_ratio=(removed * kv - 0.5) / query,
    )  # fmt: skip


def _prune_channels(tp: Any, model: Any, scorer: Any, blocks: list[Any], wanted: float, ranking: str) -> None:
    """Takes FFN channels of `blocks` until `wanted` parameters are gone, to the nearest whole channel."""
    width = model.config.intermediate_size
    pool = width if ranking == "local" else width * len(blocks)  # what one ranking is over
    cost = 3 * model.config.hidden_size * (len(blocks) if ranking == "local" else 1)
    keep = pool - round(wanted / cost)
    if not 0 < keep <= pool:
        raise BadInputError(f"{wanted:.0f} parameters cannot be taken from the FFNs of {len(blocks)} blocks.")
    if keep < pool:
        # It keeps int(channels * (1 - ratio)): half a channel less ratio, so that no rounding takes one more.
        ratio = 1 - (keep + 0.5) / pool
        _step(tp, model, scorer, [b.mlp for b in blocks], pruning_ratio=ratio, global_pruning=ranking == "global")


def _step(tp: Any, model: Any, scorer: Any, prunable: list[Any], **settings: Any) -> None:
    """One step of torch-pruning's pruner on `model`, in place, on the outputs of `prunable`'s inner layers only."""
    # Whatever writes to the residual is ignored, and with it the group of the hidden size.
    ignored = [model.lm_head, model.get_input_embeddings()]
    for block in model.model.layers:
        ignored += [block.self_attn.o_proj, block.mlp.down_proj]
        ignored += [part for part in (block.self_attn, block.mlp) if not any(part is other for other in prunable)]
    pruner = tp.pruner.BasePruner(
        model,
        torch.zeros(1, EXAMPLE_TOKENS, dtype=torch.int64, device=model.device),
        importance=scorer,
        ignored_layers=ignored,
        # Its defaults are dictionaries that all pruners of a process share, and that keep every model alive.
        in_channel_groups={},
        out_channel_groups={},
        forward_fn=lambda traced, ids: traced(ids, use_cache=False).logits,
        **settings,
    )
    pruner.step()
    # transformers repeats the KV heads by a number of its own.
    for block in model.model.layers:
        attention = block.self_attn
        attention.num_key_value_groups = attention.q_proj.out_features // attention.k_proj.out_features


def _write_sizes(model: Any) -> None:
    """The sizes that transformers keeps beside the weights; in the config only where all blocks agree."""
    sizes = set()
    for block in model.model.layers:
        attention, mlp = block.self_attn, block.mlp
        mlp.intermediate_size = mlp.gate_proj.out_features
        heads, kv = (linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj))
        sizes.add((attention.head_dim, heads, kv, mlp.intermediate_size))
    if len(sizes) == 1:
        config = model.config
        config.head_dim, config.num_attention_heads, config.num_key_value_heads, config.intermediate_size = sizes.pop()
