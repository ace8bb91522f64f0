"""The package's rooms import downwards only, and docs/architecture.md shows them as they are."""

import re

from tests.rooms import (
    BASICS,
    ENTRANCE,
    ORDER,
    PAGE,
    ROOT,
    arrows,
    home,
    page,
    room_of,
    upward,
)

import pytest


@pytest.fixture(scope="module")
def found():
    return arrows()


def test_every_room_has_a_place_in_the_order():
    names = {path.stem for path in ROOT.glob("*.py")} | {
        path.parent.name for path in ROOT.glob("*/__init__.py")
    }
    assert {room_of(name) for name in names - set(ENTRANCE)} == set(ORDER)
    assert set(BASICS) <= names


def test_imports_point_down(found):
    """So there is no cycle of rooms, either: one would have an import that points up."""
    for file, rooms in upward(found).items():
        raise AssertionError(f"{file} imports {sorted(rooms)}, which stand above {home(file)}")


def test_the_map_is_up_to_date(found):
    assert PAGE.read_text(encoding="utf-8") == page(found), f"{PAGE.name} is stale: make docs"


def test_what_the_walks_name_is_there():
    """Files and the functions named beside them, as in `decode/decoder.py` `BatchDecoder.step`."""
    named = re.findall(r"`(?!tests)([\w/]+\.py)`(?: `([\w.]+)`)?", PAGE.read_text(encoding="utf-8"))
    assert len(named) > 20
    for file, function in named:
        code = (ROOT / file).read_text(encoding="utf-8")
        for name in function.split(".") if function else ():
            assert re.search(rf"(class|def) {name}\b", code), f"{file} has no {function}"
