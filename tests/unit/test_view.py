"""What a notebook shows of a result, a lattice and a search: safe HTML with the data in it."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser

from tempo_mlx import Lattice, generate, load, search
from tempo_mlx.view import MODULE, page, snippet

import pytest

HOSTILE = "</script><script>alert(1)</script><!-- <b>\u202eabc\x1b[2J \U0001f600 ⟨e4⟩ \u2028 &amp;"


class Elements(HTMLParser):
    """The elements of a page with their attributes, and the text in each kind of them."""

    def __init__(self, html):
        super().__init__()
        self.found, self.texts, self._open = [], [], []
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        self.found.append((tag, dict(attrs)))
        self._open.append(tag)

    def handle_endtag(self, tag):
        self._open.pop()

    def handle_data(self, data):
        self.texts.append((self._open[-1] if self._open else "", data))

    def text(self, tag):
        return "".join(text for inside, text in self.texts if inside == tag)


def data_in(html):
    start = html.index('<script type="application/json">') + len('<script type="application/json">')
    return json.loads(html[start : html.index("</script>", start)])


def test_whatever_a_text_holds_the_snippet_has_the_same_elements():
    def made(text):
        token = {"id": 1, "text": text, "bytes": list(text.encode()), "probability": 0.5, "slot": 1}
        step = {"step": 0, "position": 1, "threshold": 0.1, "tokens": [token], "endings": []}
        return snippet({"prompt": text, "steps": [step], "text": text}, text)

    hostile, plain = made(HOSTILE), made("a")
    assert hostile.isascii()
    assert Elements(hostile).found == Elements(plain).found
    assert [tag for tag, _ in Elements(plain).found] == ["div", "pre", "script", "script"]
    assert data_in(hostile)["prompt"] == HOSTILE
    shown = Elements(hostile).text("pre")
    assert "</script>" in shown and "\U0001f600" in shown
    assert not re.search("[\u202e\x1b\u2028]", shown)


def test_a_page_is_whole_and_asks_for_nothing():
    html = page({"prompt": HOSTILE, "steps": []}, HOSTILE)
    elements = Elements(html)
    assert elements.found[0][0] == "html" and "\u202e" not in elements.text("title")
    # Nothing is fetched: no address but the name of SVG's namespace.
    assert re.findall(r"https?://[\w./]+", html) == ["http://www.w3.org/2000/svg"]
    assert not any({"src", "href"} & attributes.keys() for _, attributes in elements.found)
    assert not re.search(r"innerHTML|insertAdjacentHTML|document\.write|\beval\b", html)


def test_numbers_that_json_does_not_have_are_null():
    assert data_in(snippet({"tree": {"value": float("nan")}}, ""))["tree"] == {"value": None}


@pytest.mark.parametrize("visibility", ["recombined", "isolated"])
def test_results_show_themselves(folder, visibility):
    model, tokenizer = load(folder)
    options = {"max_tokens": 4, "threshold": 0.01, "max_parallel": 3, "visibility": visibility}
    result = generate(model, tokenizer, "The cat", **options)
    html = result._repr_html_()
    assert data_in(html) == json.loads(json.dumps(result.to_dict()))
    assert "The cat[" in Elements(html).text("pre")
    assert result.to_html().count(html) == 1
    assert isinstance(result.lattice, Lattice)
    assert data_in(result.lattice._repr_html_())["steps"] == data_in(html)["steps"]
    # Without paths there is nothing to draw a path through, and all the rest.
    result = generate(model, tokenizer, "The cat", paths=0, **options)
    assert data_in(result._repr_html_())["steps"] == data_in(html)["steps"]


def test_searches_show_themselves(folder):
    result = search(*load(folder), "The cat", simulations=4, max_tokens=2)
    html = result._repr_html_()
    assert data_in(html)["choices"] == json.loads(json.dumps(result.to_dict()["choices"]))
    assert result.to_html().count(html) == 1


@pytest.mark.parametrize("command", ["generate", "search"])
def test_commands_write_the_page_and_replace_only_their_own(run, folder, tmp_path, command):
    path = tmp_path / "run.html"
    arguments = [command, "The cat", "--model", folder, "--max-tokens", "2", "--html", path]
    for _ in range(2):
        code, _, err = run(*arguments)
        assert code == 0 and "run.html" in err
        assert data_in(path.read_text())["prompt"] == "The cat"
    path.write_text("<!doctype html>\n<p>mine")
    code, _, err = run(*arguments)
    assert code == 2 and "--html" in err and path.read_text().endswith("mine")
    code, _, err = run(*arguments[:-1], "-")
    assert code == 2 and "--html must end in .html, got '-'" in err


@pytest.mark.slow
@pytest.mark.skipif(not shutil.which("node"), reason="runs the module with node, which is not here")
def test_the_module_shows_characters_as_a_terminal_does(tmp_path):
    """visible() of the module is that of text/printable.py, character by character."""
    from tempo_mlx.text.printable import visible

    texts = [chr(code) for code in [*range(0x3000), 0xD800, 0xDC80, 0xFEFF, 0x1F600]] + [HOSTILE]
    code = f"""
import {{ visible }} from {json.dumps(MODULE.as_uri())};
console.log(JSON.stringify({json.dumps(texts)}.map(visible)));
"""
    script = tmp_path / "run.mjs"
    script.write_text(code)
    command = ["node", "--experimental-default-type=module", str(script)]
    run = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(run.stdout) == [visible(text) for text in texts]


CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome")
IN_A_BROWSER = pytest.mark.skipif(CHROMIUM is None, reason="draws in Chromium, which is not here")


def drawn(html, tmp_path, probe):
    """What a script finds in the page of ``html``, with ``root``, ``count`` and ``press`` at hand.

    What is drawn stands in a shadow root, which --dump-dom does not show: the script puts what it
    has found in place of the page.
    """
    path = tmp_path / "run.html"
    script = f"""<script type="module">
const root = document.querySelector(".tempo-mlx-view").shadowRoot, found = {{}};
const count = (what) => root.querySelectorAll(what).length;
const press = (name) =>
  [...root.querySelectorAll("button")].find((each) => each.textContent.startsWith(name)).click();
{probe}
document.body.replaceChildren(JSON.stringify(found));
</script></body>"""
    path.write_text(html.replace("</body>", script))
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--dump-dom", path.as_uri()]
    run = subprocess.run(command, capture_output=True, text=True, check=True, timeout=120)
    return json.loads(Elements(run.stdout).text("body"))


@pytest.mark.slow
@IN_A_BROWSER
def test_a_browser_draws_every_token_of_both_views(folder, tmp_path):
    result = generate(*load(folder), HOSTILE, max_tokens=5, threshold=0.01, max_parallel=3)
    probe = """
Object.assign(found, { text: count(".text .cell"), sets: count(".set") });
found.prompt = root.querySelector(".prompt").textContent;
press("Lattice");
Object.assign(found, { lattice: count("svg .cell"), best: count("svg text.best") });
found.scripts = document.querySelectorAll("script").length;
const first = root.querySelector("svg .cell");
first.focus();
found.tip = root.querySelector(".tip").textContent;
first.dispatchEvent(new KeyboardEvent("keydown", { key: "ArrowDown", bubbles: true }));
found.below = root.activeElement.querySelector("text").textContent;
"""
    found = drawn(result.to_html(), tmp_path, probe)
    tokens = result.lattice.n_tokens
    assert found["text"] == found["lattice"] == tokens > len(result.lattice)
    assert found["sets"] == sum(len(step.tokens) > 1 for step in result.lattice.steps)
    assert found["best"] == len(result.lattice) and found["scripts"] == 3
    assert "</script>" in found["prompt"] and "⟨U+202E⟩" in found["prompt"]
    assert "text up to here" in found["tip"]
    assert found["below"].lstrip("·") == result.lattice.steps[0].tokens[1].text.strip()


@pytest.mark.slow
@IN_A_BROWSER
def test_a_browser_draws_the_choices_and_the_tree_of_a_search(folder, tmp_path):
    result = search(*load(folder), "The cat", simulations=12, max_tokens=6)
    probe = """
found.text = count(".text .cell");
press("Choices");
Object.assign(found, { choices: count("svg .cell"), chosen: count("svg text.best") });
press("Tree");
Object.assign(found, { tree: count("svg .cell"), edges: count("svg .edge") });
"""
    found = drawn(result.to_html(), tmp_path, probe)
    children = sum(len(choice.children) for choice in result.choices)
    assert found["text"] == found["choices"] == children
    assert found["chosen"] == len(result.choices)
    visited = int((result.tree.visits > 0).sum())
    assert found["tree"] == visited == found["edges"] + 1
