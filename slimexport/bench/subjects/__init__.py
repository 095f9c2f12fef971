"""How each kind of model is found and opened. A kind is one file with `find(path)` and `open_one(place, settings)`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from slimexport.bench.subjects import gguf, onnx, transformers
from slimexport.errors import BadInputError

if TYPE_CHECKING:
    from slimexport.bench.settings import Settings, Subject


class Kind(Protocol):
    def find(self, path: Path) -> list[Path]:
        """The models in `path`; none where it is of another kind."""
        ...

    def open_one(self, place: Path, name: str, settings: Settings) -> Subject: ...


EXPORTED: tuple[Kind, ...] = (onnx, gguf)  # of a run directory, all that these find


def open_all(paths: Sequence[Path], settings: Settings) -> Mapping[str, Subject]:
    """Name -> opened model, in the order of `paths`; names are as short as they can be and still differ.

    Raises BadInputError for a path that holds no model, that is named twice, or that cannot be opened.
    """
    found = [(kind, place) for path in paths for kind, place in _find(path)]
    places = [place.resolve() for _, place in found]
    if twice := next((place for place in places if places.count(place) > 1), None):
        raise BadInputError(f"{twice} is named twice.")
    return {name: kind.open_one(place, name, settings)
            for name, (kind, place) in zip(_names(places), found, strict=True)}  # fmt: skip


def _find(path: Path) -> list[tuple[Kind, Path]]:
    if not path.exists():
        raise BadInputError(f"{path} does not exist.")
    exported = [(kind, place) for kind in EXPORTED for place in kind.find(path)]
    if found := exported or [(transformers, place) for place in transformers.find(path)]:
        return found
    raise BadInputError(
        f"{path} holds no model: an exported directory or its model.onnx, a run directory, a Hugging Face directory "
        "or a .gguf file is expected."
    )


def _names(places: Sequence[Path]) -> list[str]:
    """The last parts of each path, as many as it takes to tell them apart."""
    deepest = max(len(place.parts) for place in places)
    for parts in range(1, deepest + 1):
        names = ["/".join(place.parts[-parts:]) for place in places]
        if len(set(names)) == len(names):
            return names
    return [str(place) for place in places]
