"""The `genai` target: the same directory as `onnx`, and onnxruntime-genai has loaded it and generated from it.

Its greedy tokens are those of a plain ONNX Runtime loop on the same graph, its tokenizer gives the same ids, and the
chat template the same text.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.architectures.weights import LATENT_KEY_VALUE
from slimexport.artifacts import ExportArtifact
from slimexport.errors import BadInputError, NotReproducedError, reason
from slimexport.targets import registry
from slimexport.targets.base import Check, ExportOptions
from slimexport.targets.onnx import OnnxTarget, require

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture

PROMPT, STEPS = 12, 24
CLOSE = 1e-3  # of the logits' gap: two choices that are this near each other may change places
SAMPLE = "Once upon a time, 3 small models were shipped; what became of them?"
MESSAGES = ({"role": "user", "content": "What is the capital of France?"},)


class GenaiTarget(OnnxTarget):
    """See `slimexport.targets.base.Target`."""

    name = "genai"

    def check_options(self, options: ExportOptions) -> None:
        """Also whether onnxruntime-genai is there."""
        super().check_options(options)
        require("onnxruntime_genai")

    def check_model(self, config: PreTrainedConfig, architecture: Architecture, options: ExportOptions) -> None:
        """Also where it cannot hold the cache."""
        super().check_model(config, architecture, options)
        if any(weight.runs_along(LATENT_KEY_VALUE) for weight in architecture.family.block_weights):
            raise BadInputError(
                f"onnxruntime-genai cannot run {architecture.family.model_type} models: it caches keys and values of "
                "one width, and theirs come from a latent. `--target onnx` exports the graph for ONNX Runtime."
            )

    def export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        options: ExportOptions,
        check: Check | None = None,
    ) -> ExportArtifact:
        artifact = super().export(model, tokenizer, directory, options, check)
        if not (Path(directory) / "genai_config.json").is_file():
            why = next((note for note in artifact.notes if note.startswith("No genai_config.json")), "")
            raise BadInputError(f"onnxruntime-genai cannot run this model. {why}")
        if check:
            check_generation(Path(directory), tokenizer, options.provider)
        return artifact


def check_generation(directory: Path, tokenizer: PreTrainedTokenizerBase, provider: str) -> None:
    """Raises NotReproducedError where onnxruntime-genai makes other tokens, ids or prompts of the same input."""
    import onnxruntime_genai as genai

    try:
        settings = genai.Config(str(directory))
        # No token ends the text: the whole length is compared.
        settings.overlay(json.dumps({"model": {"eos_token_id": _vocabulary(directory) - 1}}))
        model = genai.Model(settings)
        theirs = genai.Tokenizer(model)
    except Exception as error:  # it raises RuntimeError for everything
        raise NotReproducedError(f"{directory}: onnxruntime-genai cannot load it: {reason(error)}") from error
    ids = tokenizer(SAMPLE, add_special_tokens=True).input_ids
    if (got := [int(token) for token in theirs.encode(SAMPLE)]) != list(ids):
        raise NotReproducedError(f"{directory}: onnxruntime-genai's tokenizer makes {got} of {SAMPLE!r}, not {ids}.")
    if tokenizer.chat_template:
        _check_chat(directory, tokenizer, theirs)
    _check_tokens(directory, model, provider)


def _check_chat(directory: Path, tokenizer: PreTrainedTokenizerBase, theirs: Any) -> None:
    try:
        wanted = tokenizer.apply_chat_template(list(MESSAGES), tokenize=False, add_generation_prompt=True)
    except Exception:  # one that asks for more than MESSAGES: there is nothing to compare with
        return
    try:
        got = theirs.apply_chat_template(json.dumps(list(MESSAGES)), add_generation_prompt=True)
    except Exception as error:  # a template that its small interpreter does not know
        raise NotReproducedError(
            f"{directory}: onnxruntime-genai cannot use the chat template: {reason(error)}"
        ) from error
    if got != wanted:
        raise NotReproducedError(f"{directory}: onnxruntime-genai's chat template gives {got!r}, not {wanted!r}.")


def _check_tokens(directory: Path, model: Any, provider: str) -> None:
    import numpy as np
    import onnxruntime_genai as genai

    from slimexport.runtime import OnnxDecoder

    decoder = OnnxDecoder(directory, provider)
    prompt = np.random.default_rng(0).integers(0, _vocabulary(directory) - 1, PROMPT)
    expected = decoder.greedy(prompt, STEPS)
    options = genai.GeneratorParams(model)
    options.set_search_options(max_length=PROMPT + STEPS, min_length=0, do_sample=False)
    try:
        generator = genai.Generator(model, options)
        generator.append_tokens(prompt.astype(np.int32)[None])
        while not generator.is_done():
            generator.generate_next_token()
    except Exception as error:
        raise NotReproducedError(f"{directory}: onnxruntime-genai cannot run it: {reason(error)}") from error
    got = np.asarray(generator.get_sequence(0))[PROMPT:]
    wanted = expected.tokens[: len(got)]
    differ = np.flatnonzero(got != wanted)
    if len(differ) and expected.margins[differ[0]] > CLOSE:
        step = int(differ[0])
        raise NotReproducedError(
            f"{directory}: onnxruntime-genai generates {got[step]} at step {step}, ONNX Runtime {wanted[step]}."
        )
    if len(got) < STEPS and (not len(got) or got[-1] != _vocabulary(directory) - 1):
        raise NotReproducedError(f"{directory}: onnxruntime-genai stopped after {len(got)} of {STEPS} tokens.")


def _vocabulary(directory: Path) -> int:
    return int(json.loads((directory / "genai_config.json").read_text(encoding="utf-8"))["model"]["vocab_size"])


registry.register("genai")(GenaiTarget())
