"""Sphinx's settings: `make docs` builds docs/ into site/; warnings are errors."""

import click

from slimexport import __version__
from slimexport.cli import main

project = "slimexport"
author = "slimexport maintainers"
version = release = __version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx_click"]
root_doc = "index"
exclude_patterns = ["_build"]
html_theme = "furo"
html_title = f"slimexport {__version__}"
html_show_copyright = False
nitpicky = True
smartquotes = False  # they make one dash of the two of an option

myst_heading_anchors = 3  # links such as graphs.md#what-it-costs
myst_enable_extensions = ["colon_fence"]
default_role = "code"  # docstrings put code between single backticks, as Markdown does
autodoc_typehints = "none"  # the docstrings give shapes and units
nitpick_ignore_regex = [("py:.*", ".*")]  # of signatures: other packages' inventories are not fetched


def plain(command: click.Command) -> click.Command:
    """The same with all its options in `params`, where sphinx-click looks: ours are made when they are asked for."""
    shown = command.get_params(click.Context(command))[:-1]  # without --help
    return click.Command(command.name, params=shown, help=command.help, callback=command.callback)


main.commands = {name: plain(command) for name, command in main.commands.items()}
