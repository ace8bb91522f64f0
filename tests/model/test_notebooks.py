"""The notebooks run from their first cell to the last, and hold the outputs of such a run."""

import re

import nbformat
import pytest

notebooks = pytest.importorskip("tests.notebooks")


@pytest.mark.slow
@pytest.mark.parametrize("path", sorted(notebooks.FOLDER.glob("*.ipynb")), ids=lambda p: p.name)
def test_a_notebook_runs_and_its_outputs_are_those_of_its_cells(path, embedded):
    stored, found = nbformat.read(path, as_version=4), notebooks.executed(path)
    cells = [pair for pair in zip(stored.cells, found.cells, strict=True) if "outputs" in pair[0]]
    assert len(cells) > 5
    for old, new in cells:
        assert new.outputs, "a cell that shows nothing"
        assert [kinds(each) for each in old.outputs] == [kinds(each) for each in new.outputs]
        for before, after in zip(old.outputs, new.outputs, strict=True):
            assert words(before) == words(after)


def kinds(output):
    return output.output_type, sorted(output.get("data", {}))


def words(output):
    """A text without its decimals, which rounding may change."""
    return re.sub(r"-?\d+\.\d+", "0", output.get("text", ""))
