"""The `safetensors` target: a Hugging Face directory in the precision asked for, and no graph."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from slimexport.artifacts import ExportArtifact, sha256_tree
from slimexport.errors import BadInputError
from slimexport.precisions import stays_in_float32
from slimexport.runtime.base import DTYPES
from slimexport.targets import registry
from slimexport.targets.base import Check, ExportOptions, save_artifact, without_graph

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture


class SafetensorsTarget:
    """See `slimexport.targets.base.Target`."""

    name = "safetensors"

    def check_options(self, options: ExportOptions) -> None:
        """Precisions and providers are torch's."""
        if options.precision not in DTYPES:
            known = ", ".join(DTYPES)
            raise BadInputError(f"The target safetensors holds {known}, not {options.precision}, which is for graphs.")
        if options.provider not in ("cpu", "cuda"):
            raise BadInputError(f"A checkpoint runs in torch on cpu or cuda, not on {options.provider}.")

    def check_model(self, config: PreTrainedConfig, architecture: Architecture, options: ExportOptions) -> None:
        """Whatever can be pruned can be saved."""

    def export(
        self,
        model: PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase,
        directory: Path,
        options: ExportOptions,
        check: Check | None = None,
    ) -> ExportArtifact:
        import torch

        from slimexport.architectures import architecture_of
        from slimexport.checkpoint import check_round_trip, write_model

        self.check_options(options)
        directory = Path(directory)
        architecture = architecture_of(model.config, str(directory))
        stored = copy.deepcopy(model)
        kept, dtype = stored.state_dict().keys(), getattr(torch, DTYPES[options.precision])
        for name, tensor in (*stored.named_parameters(), *stored.named_buffers()):
            if name in kept and tensor.is_floating_point():  # what is not stored stays as it is computed
                tensor.data = tensor.data.to(torch.float32 if stays_in_float32(stored, name, dtype) else dtype)
        write_model(stored, tokenizer, architecture, directory)
        if check:  # what a fresh process reads, bit for bit; `check` then says what the precision costs
            check_round_trip(stored, directory, seed=0)
        empty = without_graph(self.name, "transformers", architecture, directory, options)
        artifact = replace(empty, files=sha256_tree(directory))
        save_artifact(artifact)
        if check:
            check(artifact)
        return artifact


registry.register("safetensors")(SafetensorsTarget())
