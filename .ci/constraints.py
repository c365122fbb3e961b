"""Writes constraints.txt: what pip chooses today on each Python, merged into one file.

    python .ci/constraints.py python3.11 python3.12 python3.13   # oldest first; `make constraints`

A package that all Pythons resolve alike has one line; otherwise one line a version, with a marker that says where.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path

HEADER = """\
# Tested versions of all that the base, test and notebooks extras bring in, on Linux with Python {pythons}.
# Used as `pip install -e '.[test]' -c constraints.txt`. To regenerate, then run the tests on each Python:
#     make constraints PYTHONS="python3.11 python3.12 python3.13"
"""
EXTRAS = ".[test,notebooks]"


def main(interpreters: list[str]) -> None:
    """Resolves the extras under each interpreter and writes the merged pins."""
    chosen: dict[str, dict[str, str]] = {}
    pythons = []
    for interpreter in interpreters:
        python, versions = resolve(interpreter)
        pythons.append(python)
        for name, version in versions.items():
            chosen.setdefault(name, {})[python] = version
    lines = [line for name in sorted(chosen) for line in pins(name, chosen[name], pythons)]
    Path("constraints.txt").write_text(HEADER.format(pythons=", ".join(pythons)) + "\n".join(lines) + "\n")


def resolve(interpreter: str) -> tuple[str, dict[str, str]]:
    """The interpreter's version ("3.12") and name -> version of every package pip would install."""
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run([interpreter, "-m", "venv", folder], check=True)
        pip = [f"{folder}/bin/python", "-m", "pip", "install", "--quiet", "--dry-run", "--report", f"{folder}/report"]
        subprocess.run([*pip, EXTRAS], check=True, stdout=sys.stderr)
        with open(f"{folder}/report", encoding="utf-8") as file:
            report = json.load(file)
    found = {entry["metadata"]["name"]: entry["metadata"]["version"] for entry in report["install"]}
    versions = {re.sub(r"[-_.]+", "-", name).lower(): version for name, version in found.items()}
    versions.pop("deconfound-jax")
    return report["environment"]["python_version"], versions


def pins(name: str, versions: dict[str, str], pythons: list[str]) -> list[str]:
    """The lines of one package; the markers of the first and the last Python are open at their ends."""
    if len(set(versions.values())) == 1:  # also what only some Pythons need: a constraint installs nothing
        return [f"{name}=={next(iter(versions.values()))}"]
    lines = []
    for version in dict.fromkeys(versions.values()):
        where = [python for python in pythons if versions.get(python) == version]
        markers = [f'python_version >= "{where[0]}"'] if where[0] != pythons[0] else []
        markers += [f'python_version <= "{where[-1]}"'] if where[-1] != pythons[-1] else []
        lines.append(f"{name}=={version} ; {' and '.join(markers)}")
    return lines


if __name__ == "__main__":
    main(sys.argv[1:])
