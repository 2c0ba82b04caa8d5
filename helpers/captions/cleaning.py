"""Captions as DeepFloyd IF saw them in training."""

from __future__ import annotations

import re


def clean(caption: str) -> str:
    """Lower case, without links, markup and the like, by the cleaning of diffusers' IF pipelines, which runs it twice.

    Raises:
        ModuleNotFoundError: if beautifulsoup4 or ftfy is missing: without them diffusers only lowers the case, which
            would train on other captions than IF's.
    """
    # Imported here: diffusers takes seconds, and what only counts and reads captions must not pay for it.
    import bs4  # noqa: F401
    import ftfy  # noqa: F401
    from diffusers import IFPipeline

    # The method reads one constant of its class and no weights, so an instance without parts is enough.
    pipeline = IFPipeline.__new__(IFPipeline)
    return pipeline._text_preprocessing(caption, clean_caption=True)[0]


def erased_words(caption: str, cleaned: str) -> set[str]:
    """The words of a caption, in lower case, that its cleaned form lacks: a trigger word among them cannot be learned.

    Markup, links and mentions do not count: nobody writes them to be learned.
    """
    written = re.sub(r"<[^>]*>|https?:\S+|@\S+", " ", caption.lower())
    return set(re.findall(r"\w+", written)) - set(re.findall(r"\w+", cleaned))
