"""The words that the reader knows: one word is one token.

Keys are made of an adjective and a noun of their own lists; filler never uses a pair of the two, so
that a key stands in the document only where its fact stands.
"""

from __future__ import annotations


def _words(text: str) -> tuple[str, ...]:
    """Split a list of words at blanks."""
    return tuple(text.split())


PAD, UNK, EOS = "<pad>", "<unk>", "<eos>"
"""Padding, unknown word, end of an answer."""

ASK, COLON, STOP = "ask", ":", "."

ORDINALS = _words("first second third fourth fifth sixth seventh eighth ninth tenth")
"""Mark the keys of a question; an answer repeats them, so each next key is found by its mark."""

NUMBERS = tuple(str(number) for number in range(10, 100))
"""What a code is made of: 90 numbers, each one token."""

ADJECTIVES = _words(
    """red blue green yellow black white brown golden silver purple pink grey wooden paper glass
    iron copper tin stone leather cotton old new small large round square narrow heavy bright
    broken clean dusty empty painted striped polished folded hidden plain"""
)

NOUNS = _words(
    """lamp door box chair table bottle basket mirror clock ladder hammer kettle spoon blanket
    bucket carpet candle drawer curtain shelf pillow plate cup bowl knife jar bench cabinet desk
    trunk bell brush broom pot tray vase stool key coat hat"""
)

FILLER_ADJECTIVES = _words(
    """quiet slow gentle windy sunny rainy early late distant famous tired happy patient strange
    friendly careful lonely common"""
)

FILLER_NOUNS = _words(
    """river mountain village garden teacher farmer sailor baker doctor child neighbour road
    bridge harbour forest field market station church school island valley winter summer morning
    evening storm boat horse dog bird wagon letter song story"""
)

VERBS = _words(
    """crossed followed watched found left passed reached visited remembered described noticed
    repaired carried sold bought counted praised avoided"""
)

PREPOSITIONS = _words("near behind under beside above beyond after before without with")

ADVERBS = _words("slowly often never again once today alone together")

DETERMINERS = _words("the a every that")

FACT_OPENINGS = tuple(
    _words(opening)
    for opening in (
        "the ledger lists",
        "remember",
        "someone wrote down",
        "the label says",
        "in the inventory stands",
    )
)
"""What a fact's sentence begins with; the key and its code follow."""


def vocabulary() -> tuple[str, ...]:
    """All words, each at the place that is its token id.

    Returns
    -------
    tuple of str
        Special tokens first; no word stands twice.
    """
    openings = tuple(word for opening in FACT_OPENINGS for word in opening)
    words = (PAD, UNK, EOS, ASK, COLON, STOP, *ORDINALS, *NUMBERS, *ADJECTIVES, *NOUNS)
    words += (*FILLER_ADJECTIVES, *FILLER_NOUNS, *VERBS, *PREPOSITIONS, *ADVERBS, *DETERMINERS)
    return tuple(dict.fromkeys(words + openings))
