"""English paragraphs from folders of documents: HTML, plain text, info, dictionaries and manual pages, also gzipped.

A document is a file, and one in 50 is held out, by the hash of its text. A paragraph that stands in several documents
counts for the first, so that none is both held out and trained on.
"""

from __future__ import annotations

import gzip
import hashlib
import re
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from html.parser import HTMLParser
from pathlib import Path

from rich.progress import track

# Where Debian's packages put documentation; what is not installed is passed over.
SHARE = Path("/usr/share")
DEBIAN = tuple(
    SHARE / name
    for name in (
        *("doc", "info", "dictd", "games/fortunes", "perl", "libreoffice/help", "gimp/2.0/help/en", "help/C"),
        *("debian-reference", "developers-reference", *(f"man/man{section}" for section in range(1, 9))),
    )
)
HTML = (".html", ".htm", ".xhtml", ".page")
TEXT = re.compile(r"|\.(txt|text|rst|md|adoc|pod|dict|info(-\d+)?)")
MANUAL = re.compile(r"\.[1-8][a-z]*")
GZIP = (".gz", ".dz")
NO_PROSE = ("changelog", "copyright", "news")  # lists of changes and licences, the same over and over
SHORTEST, LONGEST = 80, 4000  # characters of a paragraph
COMMON = frozenset((
    "the", "of", "to", "and", "a", "in", "is", "that", "for", "it", "be", "or", "by", "with", "as", "this", "are",
    "not", "on", "you", "an", "from", "if", "can",
))  # fmt: skip

BLOCKS = frozenset((
    "p", "li", "dd", "dt", "td", "th", "div", "section", "h1", "h2", "h3", "h4", "h5", "h6", "blockquote", "title",
    "body", "table", "ul", "ol", "dl",
))  # fmt: skip
SKIPPED = frozenset(("script", "style", "pre", "nav"))

Document = list[str]  # its paragraphs


class CorpusError(ValueError):
    """Text that nothing can be trained on."""


@dataclass(frozen=True)
class Corpus:
    trained: list[Document]
    held_out: list[Document]


def read_corpus(folders: Iterable[Path]) -> Corpus:
    """Raises `CorpusError` where there are not two documents with English paragraphs: one is held out."""
    folders = list(folders)
    files = sorted({file for folder in folders for file in folder.rglob("*") if file.is_file()})
    seen: set[bytes] = set()
    documents: dict[str, Document] = {}  # by hash
    for file in track(files, "reading", transient=True):
        if document := [text for text in read_document(file) if _is_new(text, seen)]:
            documents[hashlib.sha256("\n\n".join(document).encode()).hexdigest()] = document
    if len(documents) < 2:
        where = ", ".join(map(str, folders))
        raise CorpusError(
            f"{len(documents)} of {len(files)} files in {where} have English paragraphs, two are needed: "
            "give folders of text with --corpus, or install documentation (assets/dream_english/README.md names it)"
        )
    held_out = {digest for digest in documents if is_held_out(digest)} or {min(documents)}
    return Corpus(
        trained=[document for digest, document in documents.items() if digest not in held_out],
        held_out=[document for digest, document in documents.items() if digest in held_out],
    )


def is_held_out(digest: str) -> bool:
    """digest: sha256 of a document's text, in hexadecimal."""
    return int(digest, 16) % 50 == 0


def _is_new(text: str, seen: set[bytes]) -> bool:
    digest = hashlib.sha256(text.encode()).digest()
    is_new = digest not in seen
    seen.add(digest)
    return is_new


def read_document(file: Path) -> Document:
    """The English paragraphs of a file, each on one line; none of one that is no text, damaged or not readable."""
    suffix = (file.with_suffix("") if file.suffix in GZIP else file).suffix.lower()
    is_manual = bool(MANUAL.fullmatch(suffix))
    if file.name.lower().startswith(NO_PROSE) or not (is_manual or suffix in HTML or TEXT.fullmatch(suffix)):
        return []
    try:
        content = file.read_bytes()
        text = (gzip.decompress(content) if file.suffix in GZIP else content).decode()
    except (OSError, EOFError, zlib.error, UnicodeDecodeError):
        return []
    if suffix in HTML:
        blocks = html_blocks(text)
    else:
        blocks = re.split(r"\n\s*\n|^%\n", plain_manual(text) if is_manual else text, flags=re.MULTILINE)
    paragraphs = (" ".join(block.split()) for block in blocks)
    return [paragraph for paragraph in paragraphs if is_english(paragraph)]


def is_english(text: str) -> bool:
    """Prose: of its words, most are letters, and one in eight is among the most common."""
    words = text.split()
    if not SHORTEST <= len(text) <= LONGEST or len(words) < 12:
        return False
    n_common = sum(word.lower() in COMMON for word in words)
    n_ascii = sum(character.isascii() for character in text)
    n_letters = sum(character.isalpha() for character in text)
    return n_common * 8 >= len(words) and n_ascii >= 0.97 * len(text) and n_letters >= 0.65 * len(text)


def plain_manual(text: str) -> str:
    """A manual page's source without its macros and changes of font."""
    text = re.sub(r"^[.'](?:B|I|BR|IR|RB|RI|BI|IB) ", "", text, flags=re.MULTILINE)
    text = re.sub(r"^[.'].*$", "\n", text, flags=re.MULTILINE)
    text = re.sub(r"\\f(?:\[\w*\]|\(..|.)|\\s[-+]?\d|\\[&/,%:]", "", text)
    text = re.sub(r"\\(?:\*\(Aq|\((?:aq|cq|oq))", "'", text)
    return text.replace("\\-", "-").replace("\\ ", " ").replace("\\e", "\\")


def html_blocks(text: str) -> list[str]:
    parser = _Blocks()
    parser.feed(text)
    parser.close()
    return parser.blocks


class _Blocks(HTMLParser):
    """Texts between the tags that end a line; none of code that stands alone, menus and scripts."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = [""]
        self._skipped = 0

    def handle_starttag(self, tag: str, attrs: object) -> None:  # noqa: ARG002 (HTMLParser's)
        self._skipped += tag in SKIPPED
        if tag in BLOCKS | SKIPPED:
            self.blocks.append("")

    def handle_endtag(self, tag: str) -> None:
        self._skipped = max(0, self._skipped - (tag in SKIPPED))
        if tag in BLOCKS | SKIPPED:
            self.blocks.append("")

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.blocks[-1] += data
