"""README and docs: every command is one that there is, and every link leads somewhere."""

import ast
import re
import shlex
import tomllib

from tempo_mlx.cli import COMMANDS, load_command
from tests.pages import PAGES, ROOT, Block, blocks, differences

import pytest

#: A command within a line of text.
INLINE = re.compile(r"`(tempo-mlx [^`\n]+)`")
LINK = re.compile(r"\]\(([^)\s]+)\)")


def options_of(words):
    """The options of a command and of its subcommands, of which one may be named or implied."""
    commands, found = [load_command(words[0])], {"--help", "-h"}
    for command in commands:
        commands += getattr(command, "commands", {}).values()
        found |= {name for each in command.params for name in (*each.opts, *each.secondary_opts)}
    return found


def check(command):
    """Fail if a command line names a command or an option that there is not."""
    words = shlex.split(command, comments=True)
    for i in [i for i, word in enumerate(words) if word == "tempo-mlx"]:
        mine = words[i + 1 :]
        mine = mine[: next((j for j, word in enumerate(mine) if word in ("|", ">", "&&")), None)]
        named = [word.partition("=")[0] for word in mine if re.match(r"--?[a-z]", word)]
        if not mine or mine[0].startswith("-"):
            continue
        assert mine[0] in COMMANDS, command
        assert set(named) <= options_of(mine), command


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_command_and_option_is_there(page):
    text = page.read_text(encoding="utf-8")
    for block in blocks(page):
        if block.kind == "python":
            ast.parse(block.text)
        else:
            for command in block.commands:
                check(command)
    for command in INLINE.findall(text):
        check(command)
    # Commands outside fences would not be run.
    outside = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    loose = re.findall(r"^    (?:\$ |tempo-mlx ).*", outside, re.MULTILINE)
    assert not loose, "put commands into ```sh, where they are run"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_leads_somewhere(page):
    for target in LINK.findall(page.read_text(encoding="utf-8")):
        file, _, heading = target.partition("#")
        if file.startswith("http"):
            continue
        path = (page.parent / file) if file else page
        assert path.resolve().is_relative_to(ROOT) and path.exists(), target
        if heading:
            titles = re.findall(r"^#+ (.+)$", path.read_text(encoding="utf-8"), re.MULTILINE)
            slugs = [re.sub(r"[^\w -]", "", title).lower().replace(" ", "-") for title in titles]
            assert heading in slugs, target


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_extra_is_there(page):
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    for names in re.findall(r"tempo-mlx\[([\w,]+)\]", page.read_text(encoding="utf-8")):
        assert set(names.split(",")) <= project["optional-dependencies"].keys()


def test_a_page_lists_every_command():
    text = (ROOT / "docs" / "commands.md").read_text(encoding="utf-8")
    named = {name for command in INLINE.findall(text) for name in command.split()[1:2]}
    assert named - {"--help"} == COMMANDS.keys()


def test_a_command_that_is_not_there_is_found():
    for command in ("tempo-mlx generat x", "cat x | tempo-mlx score - --formt tsv"):
        with pytest.raises(AssertionError):
            check(command)
    check("tempo-mlx bench decode -n 5 | head > x")


def test_fences_hold_their_outputs_and_reasons(tmp_path):
    page = tmp_path / "page.md"
    page.write_text(
        "```sh\na \\\n  b\n# c\nd\n```\n\n```text\nx\n```\n\n<!-- not run: no -->\n```sh\ne\n```\n"
        "words\n```text\ny\n```\n"
    )
    first, second = blocks(page)
    assert first == Block("sh", first.text, None, "x\n") and first.commands == ["a    b", "d"]
    assert second == Block("sh", "e\n", "no", None)


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("a -1.234\nb", "a -1.233\nb", True),
        ("a -1.234", "a -1.334", False),
        ("a 1.0", "a x", False),
        ("a\n...", "a\nb\nc", True),
        ("a", "a\nb", False),
        ("a\nb", "a", False),
    ],
)
def test_outputs_are_compared_up_to_rounding(shown, printed, same):
    assert (differences(shown, printed) is None) == same
