"""Which words follow a text without a blank."""

from tempo_mlx.scoring.joining import Joining

import pytest

GLUED = """
    It|’s  It|'s  I|'m  we|'ll  does|n't  does|n’t  you|'re  we|'VE  rock|'s.
    so|,  so|.  what|?!  5|%  (a|)  a|]  a|}  and|…  ok|."
    said|”  said|"  dogs|'  dogs|’  (|so  [|so  “|so  ¿|qué  很|。  很|，
"""
APART = """
    and|'cause  of|'em  of|’em  the|'90s  said|"no  a|(b)  a|[  a|“b  a|¿qué  a|-  a|and  n|nt
    the|'special
"""


@pytest.mark.parametrize("pair", GLUED.split())
def test_what_closes_opens_or_belongs_to_the_word_before_is_glued(pair):
    context, word = pair.split("|")
    assert Joining().join(context, word) == context + word


@pytest.mark.parametrize("pair", APART.split())
def test_words_stand_apart(pair):
    context, word = pair.split("|")
    assert Joining().join(context, word) == f"{context} {word}"


def test_blanks_count_only_if_they_are_kept():
    assert Joining().join("A:\n", " Yes ") == "A: Yes"
    keep = Joining(keep_blanks=True)
    assert keep.join("A:\n", "Yes") == "A:\nYes"
    assert keep.join("A:", " Yes ") == "A: Yes "
    assert keep.join("A:", "Yes") == "A: Yes"
    assert Joining("").join("今天 ", "好") == "今天好"
    assert Joining("_").join("a", "b") == "a_b"
    assert Joining().join("", "b") == "b" and Joining().join("a", " ") == "a"


@pytest.mark.parametrize(("separator", "keep"), [(None, False), (" ", 1)])
def test_what_is_no_rule_is_refused(separator, keep):
    with pytest.raises(ValueError, match="separator must be a text|keep_blanks must be True or"):
        Joining(separator, keep)
