"""What scripts measured, in files that outlive them, so that nothing is measured twice."""

import json
import os
from pathlib import Path
from typing import Any

#: How a line begins.
HEAD = b'{"setting": '


class Kept:
    """Measurements in a file of JSON lines, which grows with each.

    A line that a kill cut short is cut off. Several runs of a script, one after another, may share
    a file, each with a setting of its own.

    Args:
        path: of the file; made with the first measurement.

    Raises:
        SystemExit: saying so, if a line of the file is none of ours. The file is left as it is.
    """

    def __init__(self, path: Path):
        self._path = path
        self._found: dict[str, dict[str, Any]] = {}
        data = path.read_bytes() if path.exists() else b""
        *lines, torn = data.split(b"\n")
        for number, line in enumerate(lines, 1):
            try:
                record = json.loads(line)
                self._found[_key(*(record[name] for name in ("setting", "mode", "prompt")))] = (
                    record["measured"]
                )
            except (ValueError, KeyError, TypeError) as error:
                raise SystemExit(
                    f"{path}, line {number} is no measurement; give another file as --runs"
                ) from error
        if torn:
            if not (torn.startswith(HEAD) or HEAD.startswith(torn)):
                raise SystemExit(f"{path} has no measurements; give another file as --runs")
            os.truncate(path, len(data) - len(torn))

    def find(self, setting: Any, mode: str, prompt: str) -> dict[str, Any] | None:
        """What was measured of a mode and a prompt, None if nothing was."""
        return self._found.get(_key(setting, mode, prompt))

    def add(self, setting: Any, mode: str, prompt: str, measured: dict[str, Any]) -> None:
        """Keep what was measured."""
        record = {"setting": setting, "mode": mode, "prompt": prompt, "measured": measured}
        with self._path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
        self._found[_key(setting, mode, prompt)] = measured


def _key(setting: Any, mode: str, prompt: str) -> str:
    return json.dumps([setting, mode, prompt])
