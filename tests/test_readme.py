"""The README keeps its promises: its example runs, its links exist, it stays short."""

from __future__ import annotations

import re
from pathlib import Path

import duckdb
import pytest
from small_log import write_arms

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_it_is_short_and_its_links_exist():
    assert len(README.splitlines()) <= 150
    links = [link for link in re.findall(r"\]\(([^)]+)\)", README) if "://" not in link]
    assert len(links) > 5
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_python_example_runs(tmp_path, monkeypatch, capsys):
    from deconfound_jax.models.weights import minilm_folder

    try:
        minilm_folder()
    except FileNotFoundError as error:
        pytest.skip(f"the sentence encoder's weights are not installed: {error}")
    monkeypatch.chdir(tmp_path)
    write_arms("arms.parquet", tests=30)
    duckdb.sql(
        "copy (select headline, clicks, impressions, test_week as week, clickability_test_id as test "
        "from 'arms.parquet') to 'log.parquet'"
    )
    example = re.search(r"```python\n(.*?)```", README, re.S)[1]
    assert len(example.splitlines()) <= 12
    exec(compile(example, "README.md", "exec"), {})
    printed = capsys.readouterr().out.split()
    assert printed[0] in ("consistent", "bounded", "not_identified") and 0 < float(printed[-1]) < 1


def test_every_module_and_preset_the_readme_names_exists():
    from experiments.presets import PRESETS

    assert set(re.findall(r"--preset (\w+)", README)) <= set(PRESETS)
    for module in re.findall(r"python -m experiments\.(\w+)", README):
        assert (ROOT / "experiments" / f"{module}.py").exists()
