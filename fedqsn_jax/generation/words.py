"""The words of texts in any script, for scores that count words.

Latin words are left to the libraries that score them, which know no others: rouge-score drops every
letter but a to z. Scripts that write words without spaces between them count characters.
"""

import re
import unicodedata
from collections.abc import Callable, Iterator

_UNSPACED = (
    *("CJK", "IDEOGRAPHIC", "HIRAGANA", "KATAKANA", "HALFWIDTH KATAKANA", "BOPOMOFO"),
    *("THAI", "LAO", "KHMER", "MYANMAR"),
)
"""How the Unicode names of characters begin in scripts without spaces between words."""

_JOINERS = "\u200c\u200d"
_FIRST_GREEK, _SIGNS = 0x370, range(0x2000, 0x2C00)
_WIDE_PUNCTUATION = re.compile(
    r"([\u3001-\u3004\u3008-\u303f\uff01-\uff0f\uff1a-\uff20\uff3b-\uff65])"
)


def words_of(text: str, latin_words: Callable[[str], list[str]]) -> list[str]:
    """Returns the words of a text, in lower case and without punctuation.

    Args:
      text: The text.
      latin_words: Returns the words of a text without letters of other scripts; a text without
        such letters is given to it as it is.

    Returns:
      Words; of scripts without spaces single characters, with the marks that belong to them. Where
      ``latin_words`` finds none in Latin letters (all of them have accents), words are what spaces
      and punctuation divide. Of a text without words all characters
      beyond ASCII count, such as emoji.
    """
    found: list[str] = []
    for part, is_latin in _by_script(text.lower()):
        if is_latin:
            found += latin_words(part)
        else:
            found += _characters_apart(unicodedata.normalize("NFC", part)).split()
    return found or re.findall(r"[^\W_]+", text.lower()) or re.findall(r"[^\s\x00-\x7f]", text)


def with_spaces(text: str) -> str:
    """Returns a text with spaces around each character of scripts without spaces between words.

    Their punctuation is set apart, too. Other texts are returned as they are.
    """
    if not any(_is_unspaced(character) for character in text):
        return text
    return _WIDE_PUNCTUATION.sub(r" \1 ", _characters_apart(text))


def _by_script(text: str) -> Iterator[tuple[str, bool]]:
    """Parts of a text, and whether each is Latin letters, with all that is in no script."""
    start, latin = 0, True
    for index, character in enumerate(text):
        category = unicodedata.category(character)
        if category[0] == "M" or character in _JOINERS:
            continue  # It belongs to what it follows.
        is_latin = not _is_of_another_script(character, category)
        if is_latin != latin:
            if index > start:
                yield text[start:index], latin
            start, latin = index, is_latin
    if start < len(text):
        yield text[start:], latin


def _is_of_another_script(character: str, category: str) -> bool:
    code = ord(character)
    # Latin texts have signs that count as letters, such as those of units and of mathematics.
    if code < _FIRST_GREEK or code in _SIGNS or not (category[0] == "L" or category == "Nd"):
        return False
    return not unicodedata.name(character, "LATIN").startswith(("LATIN", "MATHEMATICAL"))


def _is_unspaced(character: str) -> bool:
    if character.isascii() or unicodedata.category(character)[0] not in "LN":
        return False
    return unicodedata.name(character, "").startswith(_UNSPACED)


def _characters_apart(text: str) -> str:
    """Puts spaces around characters of scripts without spaces, marks staying where they belong."""
    pieces: list[str] = []
    apart = False
    for character in text:
        is_mark = unicodedata.category(character)[0] == "M" or character in _JOINERS
        if not (is_mark and apart):
            unspaced = _is_unspaced(character)
            if unspaced or apart:
                pieces.append(" ")
            apart = unspaced
        pieces.append(character)
    return "".join(pieces)
