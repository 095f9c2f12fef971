"""`optimum-cli slimexport ...` does what `slimexport ...` does: Optimum finds this file, Click gets the words.

No __init__.py may lie in this directory or in those above it up to `plugins`: `optimum` is a namespace that several
distributions share.
"""

from __future__ import annotations

import argparse

from optimum.commands.base import BaseOptimumCLICommand, CommandInfo


class SlimExportCommand(BaseOptimumCLICommand):
    COMMAND = CommandInfo(
        name="slimexport",
        help="Make a language model smaller with SlimGPT and ship it to ONNX Runtime, verified.",
    )

    @staticmethod
    def parse_args(parser: argparse.ArgumentParser) -> None:
        # Nothing may look like an option to argparse, or it would answer --help itself and refuse the rest.
        parser.prefix_chars = "\0"
        parser.add_argument("arguments", nargs=argparse.REMAINDER)

    def run(self) -> None:
        from slimexport.cli import main

        main(self.args.arguments, prog_name="optimum-cli slimexport")


REGISTER_COMMANDS = [SlimExportCommand]
