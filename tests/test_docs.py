"""The documents keep up with the code: links, commands, knobs and quoted errors exist."""

from __future__ import annotations

import dataclasses
import re
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("*.md"))]
ALIGNMENT = (ROOT / "docs" / "alignment.md").read_text()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_and_commands_exist(page):
    text = page.read_text()
    for link in (link for link in re.findall(r"\]\(([^)]+)\)", text) if "://" not in link):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in _anchors(target), link
    for module in re.findall(r"python -m ((?:experiments|deconfound_jax)[\w.]*)", text):
        assert (ROOT / f"{module.replace('.', '/')}.py").exists(), module


@pytest.mark.parametrize("script", ["align", "train_reward_model"])
def test_command_lines_are_understood(script):
    from experiments.cli import parse_run

    pages = [*PAGES, *sorted((ROOT / "experiments").rglob("*.py"))]
    text = re.sub(r"\\+\n", " ", "\n".join(page.read_text() for page in pages))
    lines = re.findall(rf"python -m experiments\.{script} (--[^`\n]*)", text)
    for line in lines:
        _, _, known = parse_run(shlex.split(line, comments=True), "")
        assert known.workdir, line
    assert len(lines) >= 2


def test_every_knob_of_the_alignment_page_exists():
    from deconfound_jax.config import Run

    known = set(_knobs(Run()))
    heads = {name.split(".")[0] for name in known if "." in name}
    # `dpo.loss sigmoid`, `--align.lora.rank 16`; losses by their module (`dpo.hinge`) have a column of their own.
    text = re.sub(r"^\| `\w+\.\w+`.*?\|", "|", ALIGNMENT, flags=re.M)
    named = re.findall(r"`(?:--)?([a-z_]+\.[a-z_.]+)(?: [^`]*)?`|--([a-z_]+\.[a-z_.]+)", text)
    found = {name for pair in named for name in pair if name.split(".")[0] in heads}
    places = {name for name in found if _module(name)}
    assert len(found - places) > 20
    assert found - places <= known, found - places - known


def test_every_quoted_error_begins_as_the_code_says():
    source = "\n".join(path.read_text() for path in sorted((ROOT / "deconfound_jax").rglob("*.py")))
    source += "\n".join(path.read_text() for path in sorted((ROOT / "experiments").glob("*.py")))
    source = re.sub(r'"\s*\n\s*f?"', "", source)
    table = ALIGNMENT[ALIGNMENT.index("## What is refused") : ALIGNMENT.index("## Scale")]
    errors = [e for row in re.findall(r"^\| (`.*?) \|", table, re.M) for e in re.findall(r"`([^`]+)`", row)]
    assert len(errors) > 20
    for error in errors:
        # What stands before the colon may be put together at run time: a knob's name, a verdict's status.
        start, _, rest = error.partition(": ")
        known = rest in source if rest else f"{start.split()[0]} {{self.status}}: " in source
        assert error in source or known, error


def _anchors(page: Path) -> set[str]:
    """Of headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def _knobs(config, prefix=""):
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        yield prefix + field.name
        if dataclasses.is_dataclass(value):
            yield from _knobs(value, f"{prefix}{field.name}.")


def _module(name: str) -> bool:
    """Whether a dotted name begins with a module of the package: `align.scoring.text_reward`."""
    place = ROOT.joinpath("deconfound_jax", *name.split(".")[:2])
    return place.with_suffix(".py").exists() or place.is_dir()
