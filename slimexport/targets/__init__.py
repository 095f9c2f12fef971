"""What a checkpoint can be exported to. A new target is one new file here that registers itself."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimexport.registry import Registry

if TYPE_CHECKING:
    from slimexport.targets.base import Target

registry: Registry[Target] = Registry("target", package="slimexport.targets", group="slimexport.targets")
