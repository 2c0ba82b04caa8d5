"""Captions as DeepFloyd IF saw them in training."""

from __future__ import annotations

import re
import warnings

LONGEST_TEXT = 20_000
"""Letters of a caption that are looked at; the encoder reads 77 tokens."""

VOID_TAGS = frozenset("area base br col embed hr img input link meta p source track wbr li".split())
"""What in HTML may stand without an end."""

LONG_WORD = re.compile(r"(\S{1000})\S+")
"""What is no word: on a million letters without a space the cleaning would take days, its time being quadratic."""


PLAIN = re.compile(r"(?:[a-z]+(?:'[a-z]+)*|[0-9]{1,5})(?:[,.;:]? (?:[a-z]+(?:'[a-z]+)*|[0-9]{1,5}))*\.?")
"""Words and numbers with the punctuation of sentences: of those the cleaning leaves as they are all but `SPECIAL`."""

SPECIAL = re.compile(r"shipping|download|\bclick\b|\bpage\b|\b(?:png|jpe?g|bmp|webp|eps|pdf|apk)|[a-z']{1000}")
"""What the cleaning erases of such, as names of formats, and words that are no words."""


def clean(caption: str) -> str:
    """Lower case, without links, markup and the like, by the cleaning of diffusers' IF pipelines, which runs it twice.

    Of a text of more than `LONGEST_TEXT` letters, or a word of more than 1,000, only so many are read.

    Raises:
        ModuleNotFoundError: if beautifulsoup4 or ftfy is missing: without them diffusers only lowers the case, which
            would train on other captions than IF's.
    """
    import bs4
    import ftfy  # noqa: F401

    lowered = caption.strip().lower()
    # A plain caption stays as it is: to see that takes 2 us, to clean it 0.4 ms.
    if len(caption) <= LONGEST_TEXT and is_plain(lowered):
        return lowered
    from diffusers import IFPipeline  # which takes seconds

    # The method reads one constant of its class and no weights, so an instance without parts is enough.
    pipeline = IFPipeline.__new__(IFPipeline)
    readable = LONG_WORD.sub(r"\1", caption[:LONGEST_TEXT])
    with warnings.catch_warnings():
        # bs4 warns of captions that look like a path or a link: no business of a log.
        warnings.simplefilter("ignore", bs4.MarkupResemblesLocatorWarning)
        return pipeline._text_preprocessing(readable, clean_caption=True)[0]


def is_plain(caption: str) -> bool:
    """Whether a caption of lower case is certain to stay as it is."""
    return bool(PLAIN.fullmatch(caption)) and not SPECIAL.search(caption)


def erased_words(caption: str, cleaned: str) -> set[str]:
    """The words of a caption, in lower case, that its cleaned form lacks: a trigger word among them cannot be learned.

    Markup, links and mentions do not count: nobody writes them to be learned. `<sks>` does, as other trainers' users
    write their subjects: it is taken for markup only where `</sks>` follows or HTML has such a tag without an end.
    """
    text = caption[:LONGEST_TEXT].lower()
    if text == cleaned:
        return set()
    markup = VOID_TAGS | set(re.findall(r"</([\w-]+)>", text))
    text = re.sub(r"<([\w-]+)>", lambda tag: " " if tag[1] in markup else f" {tag[1]} ", text)
    written = re.sub(r"<[^<>]*>|https?:\S+|@\S+", " ", text)
    return set(re.findall(r"\w+", written)) - set(re.findall(r"\w+", cleaned))
