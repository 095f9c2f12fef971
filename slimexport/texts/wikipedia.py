"""The default text: English Wikipedia articles from the test data of the gensim wheel, without their markup.

The wheel is used as a file that every PyPI mirror has; gensim itself is never imported. What must come out is prose:
calibrating on tables, lists and leftover markup costs as much as calibrating on the wrong language.
"""

from __future__ import annotations

import bz2
import html
import re
import xml.etree.ElementTree as ET
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import IO, Any

from slimexport.errors import BadInputError
from slimexport.texts import SEPARATOR, Part, Text, split

LICENSE = "CC BY-SA / GFDL (Wikipedia)"
PACKAGE = "gensim"
INSTALL = "pip install --no-deps gensim==4.4.0"
PORTION = 4000  # characters of one article in a row of the evaluation part
SHORTEST_ARTICLE = 1500  # characters of prose; below are disambiguation pages and lists

# Stands for something that cannot be said in words (a formula, an unknown template): its sentence is dropped.
_HOLE = "\ufffc"
_ITEM = "\ufff9"  # begins a list item
_HEADING = "\ufffa"  # begins a heading

_BACK_MATTER = re.compile(
    r"^==+\s*(see also|notes?|notes and references|references( and notes)?|footnotes|citations|sources|bibliography|"
    r"further reading|external links|works cited|literature|selected (works|bibliography)|filmography)\s*==+\s*$",
    re.IGNORECASE | re.MULTILINE,
)
# References are half of the markup and never prose: cut by pattern, they do not cost parsing time.
_REFERENCE = re.compile(r"<!--.*?-->|<ref\b[^<>]*/>|<ref\b[^<>]*>.*?</ref\s*>", re.IGNORECASE | re.DOTALL)
_NOT_PROSE = frozenset(
    ("gallery", "table", "references", "timeline", "source", "syntaxhighlight", "code", "pre", "score", "imagemap")
)
_HOLE_TAGS = frozenset(("math", "chem", "ce", "hiero"))
_SILENT = re.compile(
    r"(cite|citation|sfn|harv|ref|efn|rp$|ipa|respell|pronunc|audio|listen|clarify|when|who|which|whom|by whom|where|"
    r"page needed|dubious|verify|according to|better source|fact|cn$|failed|disputed|or$|original research|"
    r"specify|vague|weasel|update|dead|anchor|infobox|taxobox|pp-|use |clear|flag|note|webarchive|"
    r"self-published|not in citation|sic$|full|primary|neutrality|toc|-$|short description|okina|wikt)"
)
_FIRST_ARGUMENT = frozenset(
    ("nowrap", "smaller", "small", "big", "vanchor", "nihongo", "sc", "smallcaps", "abbr", "nobold", "quote",
     "blockquote", "cquote")
)  # fmt: skip
_CONSTANTS = {
    "'s": "'s", "'": "'", "' \"": "'\"", "\" '": "\"'", "nbsp": " ", "thinsp": " ", "mdash": "—", "mdashb": "—",
    "ndash": "–", "spaced ndash": " – ", "snd": " – ", "spnd": " – ",
}  # fmt: skip
_UNITS = {
    "mi": "miles", "km": "kilometres", "m": "metres", "ft": "feet", "cm": "centimetres", "mm": "millimetres",
    "in": "inches", "yd": "yards", "nmi": "nautical miles", "kg": "kilograms", "lb": "pounds", "g": "grams",
    "t": "tonnes", "oz": "ounces", "L": "litres", "K": "kelvins", "acre": "acres", "ha": "hectares",
    "sqmi": "square miles", "mi2": "square miles", "sqkm": "square kilometres", "km2": "square kilometres",
    "m2": "square metres", "°C": "°C", "C": "°C", "°F": "°F", "F": "°F", "mph": "miles per hour",
    "km/h": "kilometres per hour",
}  # fmt: skip
_SUPERSCRIPT = str.maketrans("0123456789+-−", "⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁻")


# ------------------------------------------------------------------------------------------------- what is asked for


def default_text(part: Part) -> Text:
    """One part of the excerpt; the parts share no article.

    The calibration part is whole articles in their order. The evaluation part goes round its articles, `PORTION`
    characters at a time, so that its beginning is about all of them. Raises BadInputError where gensim is missing.
    """
    chosen = split(articles(str(excerpt_path())), part)
    text = SEPARATOR.join(chosen if part == "calibration" else go_round(chosen, PORTION))
    return Text(f"English Wikipedia excerpt of gensim, {part} part", (text,), license=LICENSE)


def excerpt_path() -> Path:
    """The compressed dump in the installed gensim distribution; raises BadInputError with the command to get it."""
    path = wheel_file(r"enwiki-latest-pages-articles1\.xml-.*-shortened\.bz2")
    if path is None:
        raise BadInputError(
            f"The default text is a Wikipedia excerpt in the gensim wheel, which is not installed here: {INSTALL} "
            "(nothing of it is imported), or give your own text with --calibration FILE and --eval-text FILE."
        )
    return path


def wheel_file(pattern: str) -> Path | None:
    """The file of the installed gensim distribution whose name matches all of `pattern`; None where there is none."""
    try:
        files = distribution(PACKAGE).files or []
    except PackageNotFoundError:
        files = []
    for file in files:
        if re.fullmatch(pattern, file.name):
            path = Path(str(file.locate()))
            if path.is_file():
                return path
    return None


@lru_cache(maxsize=1)
def articles(path: str) -> tuple[str, ...]:
    """Prose of every article in the dump at `path`, in its order, title first; redirects and stubs are left out."""
    with bz2.open(path, "rb") as stream:
        texts = ((title, prose(markup)) for title, markup in pages(stream))
        found = tuple(f"{title}\n\n{text}" for title, text in texts if len(text) >= SHORTEST_ARTICLE)
    if not found:
        raise BadInputError(f"{path} holds no Wikipedia articles: reinstall it ({INSTALL}), or use --calibration FILE.")
    return found


def pages(stream: IO[bytes]) -> Iterator[tuple[str, str]]:
    """(title, wikitext) of every article of a MediaWiki dump; a dump that breaks off ends there."""
    try:
        for _, element in ET.iterparse(stream):
            if not element.tag.endswith("}page"):
                continue
            ns = element.tag.removesuffix("page")
            text = element.findtext(f"{ns}revision/{ns}text") or ""
            article = element.findtext(f"{ns}ns") == "0" and element.find(f"{ns}redirect") is None
            if article and text.lstrip()[:9].lower() != "#redirect":
                yield element.findtext(f"{ns}title") or "", text
            element.clear()
    except (ET.ParseError, EOFError, OSError):
        return


def go_round(texts: Iterable[str], size: int) -> Iterator[str]:
    """Portions of about `size` characters, whole lines, one from each text in turn until all are used up."""
    queues = [list(_portions(text, size)) for text in texts]
    for turn in range(max(map(len, queues), default=0)):
        yield from (queue[turn] for queue in queues if turn < len(queue))


def _portions(text: str, size: int) -> Iterator[str]:
    lines: list[str] = []
    for line in text.split("\n"):
        lines.append(line)
        # a heading (short line) must stay with what it heads
        if sum(map(len, lines)) >= size and len(line) > 100:
            yield "\n".join(lines).strip()
            lines = []
    if rest := "\n".join(lines).strip():
        yield rest


# -------------------------------------------------------------------------------------------------- markup to prose


def prose(markup: str) -> str:
    """Wikitext -> paragraphs, one a line, headings set off by blank lines; lists, tables, formulas and notes go."""
    import mwparserfromhell

    if back := _BACK_MATTER.search(markup):
        markup = markup[: back.start()]
    markup = _REFERENCE.sub("", markup)
    lines: list[str] = []
    heading = ""
    for line in html.unescape(_render(mwparserfromhell.parse(markup))).split("\n"):
        if line.startswith(_HEADING):
            heading = " ".join(line.strip(_HEADING).split())
        elif sentences := _clean(line):
            if heading and _HOLE not in heading:  # a heading whose section is only a list would stand alone
                lines.append(f"\n{heading}\n")
            heading = ""
            lines.append(sentences)
    return "\n".join(lines).strip()


def _render(code: Any) -> str:
    return "".join(_node(node) for node in code.nodes) if code is not None else ""


def _node(node: Any) -> str:
    """One node of the parse tree as text, with `_HOLE`, `_ITEM` and `_HEADING` for the line filter."""
    renderer = _RENDERERS.get(type(node).__name__)
    return renderer(node) if renderer else ""


def _link(node: Any) -> str:
    title, text = str(node.title).strip(), _render(node.text)
    namespace, colon, rest = title.partition(":")
    if colon and namespace.lower() in ("file", "image", "category", "media"):
        return ""
    if colon and not node.text and re.fullmatch(r"[a-z]{2,3}(-[a-z-]+)?|simple", namespace):
        return ""  # the same article in another language
    return text or (rest if not namespace else title)


def _tag(node: Any) -> str:
    name = str(node.tag).strip().lower()
    if name in ("li", "dd", "dt") and node.wiki_markup:
        return _ITEM
    if name in _NOT_PROSE:
        return ""
    if name in _HOLE_TAGS:
        return _HOLE
    if name in ("br", "hr"):
        return " "
    text = _render(node.contents)
    return text.translate(_SUPERSCRIPT) if name == "sup" else text


def _template(node: Any) -> str:
    name = " ".join(str(node.name).split()).lower()
    arguments = [_render(p.value).strip() for p in node.params if not p.showkey]
    if name in _CONSTANTS:
        return _CONSTANTS[name]
    if name in ("convert", "cvt"):
        return _convert(arguments, named=any(p.showkey and str(p.name).strip() == "adj" for p in node.params))
    if name in _FIRST_ARGUMENT or (name.startswith("lang-") and arguments):
        text = arguments[0] if arguments else _HOLE
        return f"\n{text}\n" if name.endswith("quote") else text
    if name in ("lang", "transl", "script", "rtl-lang", "unicode") and len(arguments) > 1:
        return arguments[-1]
    if name in ("circa", "c.", "ca") and arguments:
        return f"c. {arguments[0]}"
    if name == "as of" and arguments:
        return ("as of " if node.has("lc") else "As of ") + arguments[0]
    return "" if _SILENT.match(name) else _HOLE


def _convert(arguments: list[str], named: bool) -> str:
    """'1300|mi|km' -> '1300 miles', '10|to|20|km' -> '10 to 20 kilometres'; anything less plain is a hole."""
    joint = " "
    if len(arguments) > 3 and arguments[1] in ("to", "and", "or", "-", "–"):
        joint = f" {arguments[1]} " if arguments[1].isalpha() else "–"
        arguments = [arguments[0] + joint + arguments[2], *arguments[3:]]
    if named or len(arguments) < 2 or arguments[1] not in _UNITS or (len(arguments) > 3 and arguments[3] in _UNITS):
        return _HOLE
    return f"{arguments[0]} {_UNITS[arguments[1]]}"


_RENDERERS: dict[str, Callable[[Any], str]] = {
    "Text": lambda node: str(node.value),
    "Wikilink": _link,
    "ExternalLink": lambda node: _render(node.title),
    "Tag": _tag,
    "Template": _template,
    "Heading": lambda node: f"\n{_HEADING}{_render(node.title)}\n",
    "HTMLEntity": lambda node: str(node.normalize()),
}


# ------------------------------------------------------------------------------------------------------- line filter

_PARENTHESES = re.compile(r"\s*\([^()]*\)")
_SENTENCE_END = re.compile(
    r"(?<=[.!?])(?<!\b[A-Z]\.)(?<!\b(?:Dr|Mr|St|Jr|Sr|no|No|vs|ca|cf)\.)(?<!\b(?:Mrs|Rev|Gen|Col)\.)(?<!\bc\.)"
    r"[\"”')\]]*\s+(?=[\"“'(\[]?[A-Z0-9])"
)
_DEBRIS = re.compile(r"[|{}\[\]<>=\\_*#^~]|https?:|thumb|\bpx\b|__|File:|Image:|ISBN")
_ENDS = re.compile(r"[.!?][\"”’')]*$")


def _clean(line: str) -> str:
    """A line of rendered markup -> its whole sentences, or '' where it is no prose."""
    if line.lstrip().startswith(_ITEM) or line.startswith((" ", ";", ":")):
        return ""
    line = " ".join(line.replace(_ITEM, " ").split())
    line = re.sub(r"''+", "", line.lstrip(_HOLE + " "))
    line = re.sub(r"(?<=[a-z]{2}\.)(?=[A-Z][a-z])", " ", line)  # a note stood between the sentences
    line = _PARENTHESES.sub(_parentheses, line)
    line = re.sub(r"\s+([,.;:!?)])", r"\1", line)
    line = re.sub(r"([,;])(?:\s*[,;])+", r"\1", line)
    kept = " ".join(s for s in _sentences(line) if _HOLE not in s and not _DEBRIS.search(s))
    words = kept.split()
    plain = sum(c.isalpha() or c.isspace() for c in kept)
    is_prose = len(words) >= 8 and _ENDS.search(kept) and plain > 0.85 * len(kept)
    return kept if is_prose and (kept[0].isupper() or kept[0] in "\"“'‘(0123456789") else ""


def _sentences(line: str) -> list[str]:
    ends = [m.end() for m in _SENTENCE_END.finditer(line)]
    return [line[a:b].strip() for a, b in zip([0, *ends], [*ends, len(line)], strict=True)]


def _parentheses(match: re.Match[str]) -> str:
    """What is left of '(…)' once its pronunciation, script or note was dropped: nothing, or a tidy rest."""
    inner = match.group().strip()[1:-1]
    if _HOLE in inner:
        return ""
    inner = re.sub(r"^(?:[\s,;:/–—-]|or\b|and\b)+|(?:[\s,;:/]|\bor|\band)+$", "", inner)
    inner = re.sub(r"([,;])(?:\s*[,;:])+", r"\1", inner)
    return f" ({inner})" if re.search(r"\w", inner) else ""
