"""Text as it is found in files: its encoding, characters that are none, and cuts through long documents."""

import codecs
from collections.abc import Iterator

REPLACEMENT = "\ufffd"
MAX_REPLACED = 0.01  # of the characters of a document; with more, the file is not in the encoding that it was read as
_MARKS = (
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def sniff_encoding(head: bytes) -> str:
    """Return the encoding of a file that begins with `head`: by its byte order mark, else UTF-16 or UTF-8."""
    for mark, encoding in _MARKS:
        if head.startswith(mark):
            return encoding
    even, odd = head[0::2], head[1::2]
    # Latin text in UTF-16 without a mark has a zero in nearly every second byte.
    if len(odd) > 1 and odd.count(0) > 0.7 * len(odd) and even.count(0) < 0.1 * len(even):
        return "utf-16-le"
    if len(even) > 1 and even.count(0) > 0.7 * len(even) and odd.count(0) < 0.1 * len(odd):
        return "utf-16-be"
    return "utf-8"


def replace_surrogates(text: str) -> str:
    """Return `text` with surrogate pairs joined and lone surrogates, which no encoding can represent, replaced."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text


def problem_of(text: str) -> str | None:
    """Return why `text` is no text that a model should see, or None."""
    if "\0" in text:
        return "holds zero bytes, so it is binary"
    if text.count(REPLACEMENT) > MAX_REPLACED * len(text):
        return "is not UTF-8 text"
    return None


def cut(text: str, size: int) -> Iterator[str]:
    """Yield pieces of at most `size` characters, cut after a paragraph, a line or a word where one ends nearby."""
    start = 0
    while len(text) - start > size:
        end = cut_position(text, start, size)
        yield text[start:end]
        start = end
    yield text[start:]


def cut_position(text: str, start: int, size: int) -> int:
    """Return where to end a piece of at most `size` characters that begins at `start`."""
    nearby = start + size - size // 8
    for separator in ("\n\n", "\n", " "):
        found = text.rfind(separator, nearby, start + size)
        if found >= 0:
            return found + len(separator)
    return start + size
