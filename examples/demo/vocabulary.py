"""The words that the demo's tokenizers know whole."""

from __future__ import annotations

from examples.demo.draw import CAPTIONS, COLOURS, OUTLINES

ENGLISH = """
the a an of on in at to and with is are photo picture drawing painting image small big large little dark
light white black grey gray pink orange brown star heart house dog cat tree flower face person hand car table
sky water wood paper old new one two three many bright soft my your his her its near under over behind front
left right top bottom close up view style made from by for very sks token
"""
"""Words that a user's captions may hold, beside the demo's own."""


def words() -> list[str]:
    """The words of the demo's captions, then other English ones; each once."""
    captions = " ".join(CAPTIONS).format(thing=" ".join((*COLOURS, *OUTLINES)))
    return list(dict.fromkeys(f"{captions} {ENGLISH}".split()))
