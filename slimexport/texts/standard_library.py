"""Code: modules of the standard library of the Python that runs, comments and docstrings included.

They are on every machine and their licence is known. Another Python version has other sources, so the sha256 differs.
"""

from __future__ import annotations

import platform
import sysconfig
from pathlib import Path

from slimexport.errors import BadInputError
from slimexport.texts import Part, Text, split

LICENSE = "PSF-2.0 (Python standard library)"
# Of many trades, written by many people; without tables of data. All are in Python 3.11 to 3.14.
MODULES = (
    "heapq", "csv", "http/cookies", "shutil", "statistics", "textwrap", "bisect", "configparser", "json/encoder",
    "random", "urllib/parse", "calendar", "fractions", "html/parser", "contextlib", "graphlib", "gettext", "shlex",
    "sched", "cmd", "fileinput", "timeit", "socketserver", "pprint", "uuid", "weakref", "copy", "json/decoder",
    "filecmp", "wave", "dataclasses", "string", "fnmatch", "tempfile", "colorsys", "queue", "reprlib", "codeop",
    "compileall", "getopt",
)  # fmt: skip


def code_text(part: Part) -> Text:
    """One part of the modules, a document each. Raises BadInputError for a Python without its sources."""
    library = Path(sysconfig.get_path("stdlib"))
    found = [text for name in MODULES if (text := _source(library, name))]
    if len(found) < len(MODULES) // 2:
        raise BadInputError(f"code: the sources of the standard library are not in {library}: give files of your own.")
    name = f"standard library of Python {platform.python_version()}, {part} part"
    return Text(name, split(found, part), license=LICENSE)


def _source(library: Path, name: str) -> str:
    for path in (library / f"{name}.py", library / name / "__init__.py"):  # a module may have become a package
        if path.is_file():
            return path.read_text(encoding="utf-8").strip()
    return ""
