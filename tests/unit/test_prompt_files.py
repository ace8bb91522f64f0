"""Files of prompts: what stands in them is what runs, and a bad row spoils no other."""

import json
from dataclasses import replace

from tempo_mlx.decode.prompt_files import read_prompts, row_settings
from tempo_mlx.rules.pruning import Pruning
from tempo_mlx.rules.schedules import Bezier, Constant, Relu
from tempo_mlx.settings import Settings

import pytest
from hypothesis import given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st


@pytest.fixture
def read(tmp_path):
    """Rows of a file with this content."""

    def read(content, name="prompts.jsonl"):
        path = tmp_path / name
        path.write_bytes(content if isinstance(content, bytes) else content.encode())
        return read_prompts(path)

    return read


def test_text_has_a_prompt_a_line(read):
    rows = read("one \r\n\r\n \t \n  zwei\u2028zwei\x0c\nlast", "prompts.txt")
    assert [(row.prompt, row.line) for row in rows] == [
        ("one ", 1),
        ("  zwei\u2028zwei\x0c", 4),
        ("last", 5),
    ]
    assert all(row.overrides == {} and row.id is None and row.error is None for row in rows)
    assert row_settings(rows[0], Settings(threshold=0.3)) == Settings(threshold=0.3)


def test_a_byte_order_mark_is_no_part_of_the_prompt(read):
    assert read(b"\xef\xbb\xbfone\r\n", "a.TXT")[0].prompt == "one"
    assert read(b'\xef\xbb\xbf{"prompt": "one"}', "a.jsonl")[0].prompt == "one"


def test_json_has_every_kind_of_prompt_and_an_id(read):
    chat = [{"role": "system", "content": "Be kind."}, {"role": "user", "content": "Hello"}]
    given = [
        {"prompt": "text", "id": "a"},
        {"prompt": [5, 0, 7], "id": 12},
        {"prompt": chat, "id": None},
        {"prompt": "same"},
    ]
    rows = read("\r\n\n".join(map(json.dumps, given)))
    assert [row.prompt for row in rows] == ["text", [5, 0, 7], chat, "same"]
    assert [row.id for row in rows] == ["a", 12, None, None]
    assert [row.line for row in rows] == [1, 3, 5, 7]
    assert [row.error for row in rows] == [None] * 4


def test_rows_override_the_defaults_and_nothing_else(read):
    defaults = Settings(
        threshold=0.2,
        max_tokens=7,
        visibility="hidden",
        stop=("x",),
        pruning=Pruning(lookback=5, threshold=0.1, schedule=Constant()),
    )
    rows = read(
        """
        {"prompt": "a"}
        {"prompt": "b", "threshold": 1, "seed": 3, "stop": ["y", "z"]}
        {"prompt": "c", "final_threshold": 0.9, "schedule": "bezier(0.1, 0.7)"}
        {"prompt": "d", "pruning": null, "max_tokens": 9}
        {"prompt": "e", "pruning": {"rule": "attention", "layers": [3, 1], "schedule": "relu(0)"}}
        {"prompt": "f", "pruning": {"layers": "last:2"}, "stop": []}
        {"prompt": "g", "pruning": {}}
        """
    )
    kept = defaults.pruning
    assert [row_settings(row, defaults) for row in rows] == [
        defaults,
        replace(defaults, threshold=1.0, seed=3, stop=("y", "z")),
        replace(defaults, final_threshold=0.9, schedule=Bezier(0.1, 0.7)),
        replace(defaults, pruning=None, max_tokens=9),
        replace(
            defaults,
            pruning=replace(kept, rule="attention", layers=(3, 1), schedule=Relu(0.0)),
        ),
        replace(defaults, pruning=replace(kept, layers=2), stop=()),
        defaults,
    ]
    assert row_settings(rows[5], Settings()).pruning == Pruning(layers=2)
    assert row_settings(rows[6], Settings()).pruning == Pruning()
    assert isinstance(row_settings(rows[1], defaults).threshold, float)


schedules = st.one_of(
    st.builds(Bezier, st.sampled_from([0.0, 0.25, 1.0]), st.sampled_from([0.5, 0.8])),
    st.builds(Relu, st.sampled_from([0.0, 0.5])),
)
prunings = st.builds(
    Pruning,
    rule=st.sampled_from(["posterior", "attention", "random"]),
    threshold=st.floats(0, 1),
    schedule=schedules | st.just(Constant()),
    lookback=st.integers(2, 9),
    layers=st.none() | st.integers(1, 4) | st.lists(st.integers(0, 9), min_size=1).map(tuple),
    steepness=st.floats(0.1, 1e6),
)
many_settings = st.builds(
    lambda moves, **given: Settings(**given, **moves),
    st.just({})
    | st.fixed_dictionaries({"schedule": schedules, "final_threshold": st.floats(0.01, 1)}),
    max_tokens=st.integers(1, 1000),
    threshold=st.floats(1e-9, 1),
    temp=st.floats(0.1, 10),
    seed=st.none() | st.integers(0, 2**63 - 1),
    sampling=st.sampled_from(["deterministic", "gumbel"]),
    visibility=st.sampled_from(["isolated", "visible", "hidden"]),
    pruning=st.none() | prunings,
    stop=st.lists(st.text(st.characters(codec="utf-8"), min_size=1), max_size=3).map(tuple),
)


@hypothesis_settings(max_examples=60)
@given(wanted=many_settings, defaults=many_settings)
def test_what_settings_write_a_row_reads_back(tmp_path_factory, wanted, defaults):
    path = tmp_path_factory.mktemp("rows") / "prompts.jsonl"
    path.write_text(json.dumps({"prompt": "a", **wanted.to_dict()}, ensure_ascii=False), "utf-8")
    (row,) = read_prompts(path)
    assert row_settings(row, defaults) == wanted


BAD = [
    (b'{"prompt": "x"', ["not JSON", "column"]),
    (b"[" * 100_000, ["recursion"]),
    (b'{"prompt": "x", "seed": ' + b"1" * 5000 + b"}", ["not JSON"]),
    (b'{"prompt": "\xff"}', ["not UTF-8"]),
    (rb'{"prompt": "\ud83d"}', ["surrogate"]),
    (b'["x"]', ["not a JSON object"]),
    (b'{"prompt": "x", "threshold": NaN}', ["NaN is not a number in JSON"]),
    (b'{"prompt": "x", "temp": Infinity}', ["Infinity is not a number in JSON"]),
    (b'{"prompt": "x", "temp": -Infinity}', ["-Infinity is not a number in JSON"]),
    (b'{"prompt": "x", "temp": 1e400}', ["1e400 is too large"]),
    (b'{"prompt": "x", "prompt": "y"}', ['key "prompt" occurs twice']),
    (b'{"prompt": "x", "id": 1, "id": 1}', ['key "id" occurs twice']),
    (b'{"prompt": "x", "pruning": {"rule": "random", "rule": "random"}}', ['"rule"', "twice"]),
    (b'{"prompt": "x", "id": ' + b"[" * 200 + b"]" * 200 + b"}", ["more than 100 levels"]),
    (b"{}", ['no "prompt"']),
    (b'{"prompts": "x"}', ['no "prompt"']),
    (b'{"prompt": null}', ["prompt must be text"]),
    (b'{"prompt": ""}', ["prompt is empty"]),
    (b'{"prompt": []}', ["prompt is empty"]),
    (b'{"prompt": [1, true]}', ["prompt must be", "token ids"]),
    (b'{"prompt": [1, "a"]}', ["prompt must be", "token ids"]),
    (b'{"prompt": [{"content": "a"}]}', ["prompt must be", "role"]),
    (b'{"prompt": "x", "id": 1.5}', ["id must be text or an integer", "1.5"]),
    (b'{"prompt": "x", "id": true}', ["id must be"]),
    (b'{"prompt": "x", "treshold": 0.1}', ["'treshold'", "max_tokens, threshold"]),
    (b'{"prompt": "x", "threshold": "0.1"}', ["threshold must be a number", '"0.1"']),
    (b'{"prompt": "x", "threshold": true}', ["threshold must be a number", "true"]),
    (b'{"prompt": "x", "threshold": 1' + b"0" * 400 + b"}", ["too large"]),
    (b'{"prompt": "x", "max_tokens": 2.0}', ["max_tokens must be an integer", "2.0"]),
    (b'{"prompt": "x", "seed": "a"}', ["seed must be an integer or null"]),
    (b'{"prompt": "x", "stop": "end"}', ["stop must be a list of texts"]),
    (b'{"prompt": "x", "stop": ["end", 1]}', ["stop must be a list of texts"]),
    (b'{"prompt": "x", "visibility": {}}', ["visibility must be text"]),
    (b'{"prompt": "x", "schedule": 1}', ["schedule must be text such as"]),
    (b'{"prompt": "x", "schedule": "bezier(2,0)"}', ["schedule", "p1", "[0, 1]"]),
    (b'{"prompt": "x", "pruning": "posterior"}', ["pruning must be an object or null"]),
    (b'{"prompt": "x", "pruning": {"rules": 1}}', ["'rules'", "rule, threshold, decision"]),
    (b'{"prompt": "x", "pruning": {"lookback": 2.5}}', ["prune lookback must be an integer"]),
    (b'{"prompt": "x", "pruning": {"layers": "x"}}', ["prune layers must be all, last:N"]),
    (b'{"prompt": "x", "pruning": {"schedule": "bezir"}}', ["schedule must be", "bezir"]),
]


@pytest.mark.parametrize(("line", "names"), BAD)
def test_a_row_that_cannot_be_read_says_why_and_the_others_stand(read, line, names):
    rows = read(b'{"prompt": "a", "id": 1}\n\n' + line + b'\n{"prompt": "c", "id": 3}')
    assert [row.prompt for row in rows[::2]] == ["a", "c"] and len(rows) == 3
    assert rows[0].error is None and rows[2].error is None
    for name in ["prompts.jsonl, line 3: ", *names]:
        assert name in rows[1].error
    assert rows[1].line == 3 and rows[1].overrides == {}
    with pytest.raises(ValueError) as error:
        row_settings(rows[1], Settings())
    assert str(error.value) == rows[1].error


def test_lists_of_any_depth_are_errors_of_their_rows(read):
    # Among them those that Python's JSON reads but cannot write.
    depths = [1, *range(900, 1010), 100_000]
    rows = read("\n".join(f'{{"prompt": "x", "stop": {"[" * n}{"]" * n}}}' for n in depths))
    assert rows[0].overrides == {"stop": ()}
    assert len(rows) == len(depths) and all(row.error is not None for row in rows[1:])


def test_a_row_with_an_error_keeps_its_id_and_prompt(read):
    (row,) = read('{"id": "a", "prompt": "b", "treshold": 1}')
    assert row.error is not None and (row.id, row.prompt) == ("a", "b")


def test_a_line_that_is_no_utf8_is_a_row_of_its_own(read):
    good, bad = read(b"good\nb\xe4d\n", "prompts.txt")
    assert good.prompt == "good" and good.error is None
    assert bad.prompt is None and "prompts.txt, line 2: not UTF-8 text" in bad.error


@pytest.mark.parametrize(
    ("given", "names"),
    [
        ('"threshold": 2', ["threshold must be in (0, 1]", "2"]),
        ('"max_tokens": 0', ["max_tokens", "at least 1", "0"]),
        ('"visibility": "all"', ["visibility", "isolated", "all"]),
        ('"stop": [""]', ["stop"]),
        ('"final_threshold": 0.5', ["final_threshold needs a schedule"]),
        ('"pruning": {"threshold": 2}', ["prune threshold", "[0, 1]", "2"]),
        ('"pruning": {"min_age": 4}', ["prune min_age", "[1, 3]", "4"]),
    ],
)
def test_values_out_of_range_are_named_with_their_line(read, given, names):
    _, row = read('{"prompt": "a"}\n{"prompt": "b", ' + given + "}")
    assert row.error is None
    with pytest.raises(ValueError) as error:
        row_settings(row, Settings())
    for name in ["prompts.jsonl, line 2: ", *names]:
        assert name in str(error.value)


def test_files_that_cannot_be_used_are_refused(read, tmp_path):
    with pytest.raises(ValueError, match=r"prompts\.csv must end in \.txt or \.jsonl"):
        read("a", "prompts.csv")
    for content in ("", " \n\r\n", b"\xef\xbb\xbf"):
        with pytest.raises(ValueError, match=r"prompts\.jsonl has no prompts"):
            read(content)
    with pytest.raises(ValueError, match=r"none\.txt cannot be read: No such file"):
        read_prompts(tmp_path / "none.txt")
    (tmp_path / "folder.txt").mkdir()
    with pytest.raises(ValueError, match=r"folder\.txt cannot be read: Is a directory"):
        read_prompts(tmp_path / "folder.txt")
