"""News: the background documents of the Lee corpus from the test data of the gensim wheel.

293 different stories of the Australian Broadcasting Corporation, 2000-2001. The wheel (LGPL-2.1) names no licence for
them. Its `lee.cor` is another set of 50 stories, which benchmarks measure on: it is not read here, and the two share no
8-gram of words.
"""

from __future__ import annotations

from slimexport.errors import BadInputError
from slimexport.texts import Part, Text, split
from slimexport.texts.wikipedia import INSTALL, wheel_file

FILE = r"lee_background\.cor"


def news_text(part: Part) -> Text:
    """One part of the stories, a document each; the parts share none. Raises BadInputError where gensim is missing."""
    path = wheel_file(FILE)
    if path is None:
        raise BadInputError(f"news: stories in the gensim wheel, which is not installed here: {INSTALL}.")
    stories = dict.fromkeys(line.strip() for line in path.read_text(encoding="utf-8").split("\n"))
    name = f"news stories of gensim (lee_background.cor), {part} part"
    return Text(name, split([story for story in stories if story], part), note="no licence is stated for the news")
