"""Tokens as bytes and texts in whole characters, with tokenizers that split characters."""

import json

from tempo_mlx.generation import generate
from tempo_mlx.lattice.rendering import StepWriter, plain
from tempo_mlx.text.printable import json_text, running, spelled, unfinished, visible
from tempo_mlx.text.vocabulary import Vocabulary
from tests.byte_tokenizers import END, byte_fallback, byte_level
from tests.tiny_models import tiny_model

import pytest
from hypothesis import given
from hypothesis import strategies as st

TOKENIZERS = {
    "byte-level": byte_level((" the", "天", "é", " \u4f00", "😏")),
    "byte fallback": byte_fallback("abcdefgh .,é天"),
}
VOCABULARIES = {name: Vocabulary(tokenizer) for name, tokenizer in TOKENIZERS.items()}
texts = st.text(st.sampled_from("abc é天气😏😐\u202e\n\u0e2a\ufffd한"), max_size=12)


@pytest.mark.parametrize("kind", TOKENIZERS)
@given(text=texts, n=st.integers(0, 40))
def test_tokens_spell_their_text_and_no_part_of_a_character_is_text(kind, text, n):
    vocabulary = VOCABULARIES[kind]
    ids = TOKENIZERS[kind].encode(text, add_special_tokens=False)
    assert b"".join(map(vocabulary.bytes_of, ids)) == text.encode()
    assert vocabulary.decode(ids) == text
    # What is decoded of a beginning is the characters that are complete there.
    raw = b"".join(map(vocabulary.bytes_of, ids[:n]))
    assert vocabulary.decode(ids[:n]) == raw.decode(errors="ignore")
    assert text.startswith(vocabulary.decode(ids[:n]))


@pytest.mark.parametrize("kind", TOKENIZERS)
def test_every_byte_has_a_token_that_says_so(kind):
    vocabulary = VOCABULARIES[kind]
    single = {vocabulary.bytes_of(id) for id in range(len(TOKENIZERS[kind]))}
    assert {bytes([byte]) for byte in range(256)} <= single
    assert END.encode() in single


@pytest.mark.parametrize(
    ("raw", "text"),
    [
        (b"abc", "abc"),
        ("天".encode(), "天"),
        (b"\xe4\xbb", "⟨e4 bb⟩"),
        (b" \xe4\xbb", " ⟨e4 bb⟩"),
        (b"\xa9.", "⟨a9⟩."),
        (b"\xff\xe5\xa4\xa9\x80", "⟨ff⟩天⟨80⟩"),
        ("\ufffd".encode(), "\ufffd"),
    ],
)
def test_bytes_are_shown_where_there_is_no_character(raw, text):
    assert spelled(raw) == text


@given(st.text(max_size=5), st.integers(0, 3))
def test_unfinished_counts_the_bytes_of_the_last_character_that_is_begun(text, cut):
    raw = text.encode("utf-8", "ignore")
    raw = raw[: len(raw) - cut]
    whole = raw.decode(errors="ignore").encode()
    assert whole + raw[len(raw) - unfinished(raw) :] == raw


def test_control_characters_are_shown_and_never_sent():
    hostile = "a\x1b]52;c;Zm9v\x07b\x9b2J\u202ecba\u2066\r\n\tc\x7f\u2028\ud800"
    assert visible(hostile) == ("a␛]52;c;Zm9v␇b⟨U+009B⟩2J⟨U+202E⟩cba⟨U+2066⟩␍⏎⇥c␡⟨U+2028⟩\ufffd")
    assert running(hostile).replace("\n", "⏎").replace("\t", "⇥") == visible(hostile)
    line = json_text({"text": hostile})
    assert line.isprintable() and json.loads(line) == {"text": hostile}
    with pytest.raises(ValueError, match="not JSON compliant"):
        json_text({"text": float("nan")})


def sets_of(*steps):
    """Steps as the model would have made them, of tokens given by their bytes."""
    from tempo_mlx.lattice.lattice import Step, Token

    slot = 0
    made = []
    for number, raws in enumerate(steps):
        tokens = []
        for raw in raws:
            tokens.append(Token(slot, spelled(raw), 0.5, slot, raw=raw))
            slot += 1
        made.append(Step(number, number, 0.1, tokens))
    return made


def written(*steps):
    writer = StepWriter()
    shown = [plain(writer.write(step)) for step in sets_of(*steps)]
    return [*shown, plain(writer.finish())]


def test_single_tokens_are_written_in_whole_characters():
    assert written([b"a\xe5"], [b"\xa4"], [b"\xa9\n"], [b"\xe4\xbb"]) == [
        "a", "", "天\n", "", "⟨e4 bb⟩",
    ]  # fmt: skip


def test_a_set_shows_bytes_symbols_and_what_waited_before_it():
    assert written([b"\xe5"], [b"\xa4\xa9", b"\n", b"\x1b[2J"], [b"\xa4"], [b"b"]) == [
        "", "⟨e5⟩[⟨a4 a9⟩/⏎/␛[2J]", "⟨a4⟩", "b", "",
    ]  # fmt: skip


@pytest.mark.parametrize("threshold", [0.004, 1.0])
@pytest.mark.parametrize("visibility", ["recombined", "isolated", "tree"])
def test_results_have_bytes_for_each_token_and_whole_characters_as_text(threshold, visibility):
    tokenizer = TOKENIZERS["byte-level"]
    model = tiny_model("llama", seed=2, vocab_size=len(tokenizer))
    result = generate(
        model, tokenizer, "天", threshold=threshold, max_tokens=12, max_parallel=3,
        visibility=visibility,
    )  # fmt: skip
    data = json.loads(json_text(result.to_dict()))
    known = {t["id"]: bytes(t["bytes"]) for step in data["steps"] for t in step["tokens"]}
    assert any(spelled(raw).startswith("⟨") for raw in known.values())
    for step in data["steps"]:
        for token in step["tokens"]:
            assert token["text"] == spelled(bytes(token["bytes"]))
    for path in data["paths"]:
        raw = b"".join(known[id] for id in path["tokens"])
        complete = raw[: len(raw) - unfinished(raw)]
        assert path["text"] == complete.decode(errors="replace")
    assert data["text"] == data["paths"][0]["text"]
