"""The rooms of the package, in their order, and who imports whom: behind docs/architecture.md.

``python -m tests.rooms`` writes the map of that page. A room is a package of ``tempo_mlx``, or a
module that stands beside the packages.
"""

import ast
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[1] / "tempo_mlx"
PAGE = ROOT.parent / "docs" / "architecture.md"
BEGIN, END = "<!-- the map: make docs -->\n", "<!-- end of the map -->\n"

#: Rooms from top to bottom: each may import those below it.
ORDER = (
    "cli",
    "bench",
    "server",
    "experiments",
    "evaluation",
    "doctor",
    "search",
    "scoring",
    "conversation",
    "generation",
    "keywords",
    "decode",
    "drafts",
    "plots",
    "weights",
    "settings",
    "needs",
    "rules",
    "lattice",
    "view",
    "io",
    "text",
    "models",
    "basics",
)
#: Modules that every room may import, drawn as one room.
BASICS = ("arguments", "blas", "errors", "interrupts", "numerics", "old_names")
#: The names that users import, and ``python -m tempo_mlx``: above all rooms.
ENTRANCE = ("__init__", "__main__")

#: An arrow: the importing file, relative to the package, and the room that it imports.
Arrow = tuple[str, str]


def room_of(name: str) -> str:
    return "basics" if name in BASICS else name


def home(file: str) -> str:
    """The room that a file stands in."""
    return room_of(file.split("/")[0].removesuffix(".py"))


def arrows() -> set[Arrow]:
    """Every import of one room by a file of another, at any place in the file.

    What is imported for type checkers alone is left out: nothing runs of it.
    """
    found = set()
    for path in sorted(ROOT.rglob("*.py")):
        file = path.relative_to(ROOT).as_posix()
        for name in _imported(ast.parse(path.read_text(encoding="utf-8")), path):
            room = room_of(name)
            if home(file) not in (room, *ENTRANCE):
                found.add((file, room))
    return found


def _imported(tree: ast.AST, path: Path) -> Iterator[str]:
    """Modules and packages right below ``tempo_mlx`` that a file imports."""
    package = ["tempo_mlx", *path.relative_to(ROOT).parts[:-1]]
    for node in _run(tree):
        names = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            base = [*base, *([node.module] if node.module else [])]
            names = [".".join([*base, alias.name]) for alias in node.names]
        for top, *below in (name.split(".") for name in names):
            if top == "tempo_mlx":
                exists = below and any((ROOT / f"{below[0]}{end}").exists() for end in ("", ".py"))
                yield below[0] if exists else "__init__"


def _run(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes of a tree that run."""
    yield node
    for child in ast.iter_child_nodes(node):
        is_check = isinstance(child, ast.If) and ast.unparse(child.test) == "TYPE_CHECKING"
        if not is_check:
            yield from _run(child)


def upward(found: set[Arrow]) -> dict[str, set[str]]:
    """Files that import rooms that are not below their own, with these rooms."""
    rank = {room: place for place, room in enumerate(ORDER)}
    rank |= dict.fromkeys(ENTRANCE, -1)
    against: dict[str, set[str]] = {}
    for file, room in found:
        if rank[room] <= rank[home(file)]:
            against.setdefault(file, set()).add(room)
    return against


def description(room: str) -> str:
    """The first line of the room's docstring."""
    if room == "basics":
        return f"Modules that every room may import: {', '.join(BASICS)}."
    path = ROOT / room / "__init__.py"
    path = path if path.exists() else ROOT / f"{room}.py"
    text = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8"))) or ""
    return text.splitlines()[0]


def drawn(found: set[Arrow]) -> str:
    """The map: a row for each room with a mark under every room that it imports, and a table."""
    pairs = {(home(file), room) for file, room in found}
    width = 4 + max(map(len, ORDER))
    lines = ["```", " " * width + "".join(f"{n:>3}" for n in range(1, len(ORDER) + 1))]
    for number, room in enumerate(ORDER, 1):
        cells = []
        for place, other in enumerate(ORDER, 1):
            mark = "->" if place > number else "!!"
            cells.append("\\" if place == number else mark if (room, other) in pairs else ".")
        lines.append(f"{number:>2}  {room:<{width - 4}}" + "".join(f"{cell:>3}" for cell in cells))
    lines += ["```", "", "| room | what it is |", "|---|---|"]
    lines += [f"| `{room}` | {description(room).replace('``', '`')} |" for room in ORDER]
    return "\n".join(lines) + "\n"


def page(found: set[Arrow]) -> str:
    """The page with the map in it."""
    before, rest = PAGE.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    return f"{before}{BEGIN}{drawn(found)}{END}{after}"


if __name__ == "__main__":
    PAGE.write_text(page(arrows()), encoding="utf-8")
