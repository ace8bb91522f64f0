"""What holds everywhere in the package's source."""

import ast
import re
from pathlib import Path

import tempo_mlx
from tempo_mlx.models import PositionedModel, UnsupportedModelError
from tempo_mlx.models.rows import TokenRows
from tests.tiny_models import tiny_model

import pytest

#: Fields whose == is an array, or takes long.
ARRAYS = re.compile(r"ndarray|mx\.array|\bSlots\b|\bLattice\b|\bSlotStore\b|nn\.Module")


def test_dataclasses_that_hold_arrays_compare_by_identity():
    found = 0
    for file in Path(tempo_mlx.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if not isinstance(node, ast.ClassDef):
                continue
            decorators = [ast.unparse(each) for each in node.decorator_list]
            fields = [ast.unparse(e.annotation) for e in node.body if isinstance(e, ast.AnnAssign)]
            holds = any(ARRAYS.search(each) and "Callable" not in each for each in fields)
            if holds and any(each.startswith("dataclass") for each in decorators):
                found += 1
                assert any("eq=False" in each for each in decorators), f"{file.name}: {node.name}"
    assert found > 10


def test_an_error_of_ours_is_not_blamed_on_the_model(monkeypatch):
    monkeypatch.setattr(TokenRows, "by_sequence", None)
    with pytest.raises(TypeError, match="not callable"):
        PositionedModel(tiny_model("llama"))


def test_an_error_of_the_model_is(monkeypatch):
    model = tiny_model("llama")
    monkeypatch.setattr(
        type(model.model.layers[0].self_attn), "__call__", lambda self, x, mask, cache: x + cache.no
    )
    with pytest.raises(UnsupportedModelError, match="instead of handing them to a rotary"):
        PositionedModel(model)
