"""What the scripts share: measurements that a file keeps."""

import json
import sys

from tests.commands import ROOT

import pytest


@pytest.fixture
def Kept(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    monkeypatch.delitem(sys.modules, "kept", raising=False)
    from kept import Kept

    return Kept


def test_measurements_are_kept_by_setting_mode_and_prompt(Kept, tmp_path):
    path = tmp_path / "runs.jsonl"
    kept = Kept(path)
    kept.add(["model", 3], "greedy", "é\n", {"rows": 4})
    assert kept.find(["model", 3], "greedy", "é\n") == {"rows": 4}
    again = Kept(path)
    again.add(["model", 5], "greedy", "é\n", {"rows": 6})
    assert again.find(["model", 3], "greedy", "é\n") == {"rows": 4}
    assert again.find(["model", 3], "beam", "é\n") is None
    assert len(path.read_text().splitlines()) == 2


def test_a_line_that_was_cut_short_is_cut_off(Kept, tmp_path):
    path = tmp_path / "runs.jsonl"
    Kept(path).add(1, "greedy", "a", {"rows": 4})
    whole = path.read_bytes()
    for end in (1, 12, len(whole) - 1):
        path.write_bytes(whole + whole[:end])
        kept = Kept(path)
        assert path.read_bytes() == whole
        kept.add(1, "greedy", "b", {"rows": 5})
        assert json.loads(path.read_text().splitlines()[1])["prompt"] == "b"


@pytest.mark.parametrize("content", ["text", "text\n", '{"setting": 1}\n', "[]\n", '{"a": 1'])
def test_a_file_of_someone_else_is_left_alone(Kept, tmp_path, content):
    path = tmp_path / "notes.txt"
    path.write_text(content)
    with pytest.raises(SystemExit, match=r"notes\.txt.*give another file as --runs"):
        Kept(path)
    assert path.read_text() == content
