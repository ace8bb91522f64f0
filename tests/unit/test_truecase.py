"""English truecasing: letters' case and nothing else, the same in every process, offline."""

import copy
import socket
import sys

from tempo_mlx.scoring import truecase

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st


@pytest.fixture(scope="module")
def caser():
    """The package's statistics, loaded where neither network nor NLTK's data can be had."""
    package, nltk = pytest.importorskip("truecase"), pytest.importorskip("nltk")

    def refused(*_, **__):
        raise OSError("no network and no data here")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(socket, "socket", refused)
        patch.setattr(socket, "getaddrinfo", refused)
        patch.setattr(nltk.data, "find", refused)
        loaded = package.TrueCaser()
        patch.setattr(package, "TrueCaser", lambda: copy.copy(loaded))
        truecase.english.cache_clear()
        assert truecase.english()("he met john and i left") == "He met John and I left"
    return loaded


@pytest.fixture
def made(caser, monkeypatch):
    """Makes the function anew, of the forms of each word in an order."""

    def make(order=list):
        fresh = copy.copy(caser)
        lookup = caser.word_casing_lookup
        fresh.word_casing_lookup = {word: order(forms) for word, forms in lookup.items()}
        monkeypatch.setattr("truecase.TrueCaser", lambda: fresh)
        truecase.english.cache_clear()
        return truecase.english()

    yield make
    truecase.english.cache_clear()


@pytest.fixture(scope="module")
def english(caser):
    return truecase.english()


def same_but_for_case(one, other):
    return len(one) == len(other) and one.lower() == other.lower()


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("he is also happy", "He is also happy"),
        ("  i met john ,  in new york", "  I met John ,  in New York"),
        ("i'm sure john's friends don't know", "I'm sure John's friends don't know"),
        ("i’d go, i’m john’s friend", "I’d go, I’m John’s friend"),
        ('john said "hello mary" and left', 'John said "hello Mary" and left'),
        ("``john'' said \"hello mary\" to `mary`", "``John'' said \"hello Mary\" to `Mary`"),
        ("“john” and ‘mary’", "“John” and ‘Mary’"),
        # The tokenizer splits these; their second parts are no words.
        ("gonna, wanna go? i cannot", "Gonna, wanna go? I cannot"),
        ("JOHN IS HERE", "John is here"),
        ("I'M AT MARY'S, I’VE COME", "I'm at Mary's, I’ve come"),
        # Words that are not known stay as they are.
        ("john has a zQxv", "John has a zQxv"),
        ("john日本 und straße", "john日本 und straße"),
        ("john\tand\nmary\u00a0smith", "John\tand\nMary\u00a0Smith"),
        ("?! ... 1,000.50", "?! ... 1,000.50"),
        ("  ", "  "),
        ("", ""),
    ],
)
def test_gives_words_their_case(english, text, expected):
    assert same_but_for_case(text, expected), "the example itself"
    assert english(text) == expected


def test_what_follows_can_change_the_case_of_a_word(english):
    # The case of `new` shows only once its next word is known.
    assert english("he saw new") == "He saw new"
    assert english("he saw new york") == "He saw New York"


WORDS = ["john", "i", "don't", "cannot", "gonna", "McCoy", "İstanbul", "ΑΣ", "straße", "ß", "ﬁ"]
SIGNS = [" ", '"', "''", "``", "`", "'", "“", "”", "’", "--", "...", ".", ",", "(", "\t", "\x1f"]


@settings(max_examples=300)
@given(st.lists(st.sampled_from(WORDS + SIGNS) | st.text(max_size=3), max_size=12).map("".join))
def test_changes_the_case_of_letters_and_nothing_else(english, text):
    assert same_but_for_case(english(text), text)


def test_is_the_same_in_every_process(made):
    # The forms of each of these words score alike, and the order of a set of texts is random.
    text = "the hamlet solicitor battalion jockey banjo macdonald letterman mayoral owls"
    up, down = made(sorted), made(lambda forms: sorted(forms, reverse=True))
    assert up(text) == down(text) == "The" + text[3:].replace("macdonald", "Macdonald")


@pytest.mark.parametrize("package", ["truecase", "nltk.tokenize"])
def test_says_what_to_install(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    truecase.english.cache_clear()
    with pytest.raises(ValueError, match=r"pip install 'tempo-mlx\[truecase\]'"):
        truecase.english()
