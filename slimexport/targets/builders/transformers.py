"""stub"""

from __future__ import annotations

from slimexport.targets.base import BuilderUnsupportedError


class TransformersBuilder:
    name = "transformers"

    def build(self, model, directory, options):
        raise BuilderUnsupportedError("not yet")
