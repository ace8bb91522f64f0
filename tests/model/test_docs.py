"""README and docs: every command and every piece of Python runs, and prints what the page shows."""

import os
import subprocess
import sys

from tests.pages import PAGES, ROOT, blocks, differences

import pytest

#: Commands of a page that run with a shell that stops at the first error.
SHELL = ["bash", "-euo", "pipefail", "-c"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "page", [page for page in PAGES if blocks(page)], ids=lambda page: page.name
)
def test_a_page_does_what_it_says(page, tmp_path, monkeypatch, embedded):
    programs = tmp_path / "programs"
    programs.mkdir()
    for name, module in (("tempo-mlx", " -m tempo_mlx"), ("python", "")):
        program = programs / name
        program.write_text(f'#!/bin/sh\nexec "{sys.executable}"{module} "$@"\n')
        program.chmod(0o755)
    folder = tmp_path / "page"
    folder.mkdir()
    monkeypatch.chdir(folder)
    environment = os.environ | {
        "PATH": f"{programs}:{os.environ['PATH']}",
        "PYTHONPATH": str(ROOT),
        "COLUMNS": "120",
    }
    names = {}
    for block in blocks(page):
        if block.reason is not None:
            continue
        if block.kind == "python":
            exec(compile(block.text, page.name, "exec"), names)
            continue
        lines = [line for line in block.commands if not line.startswith("pip install")]
        command = [*SHELL, "\n".join(lines)]
        run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=900)
        assert run.returncode == 0, f"{block.text}\n{run.stderr[-2000:]}"
        if block.output is not None:
            assert differences(block.output, run.stdout) is None, run.stdout
