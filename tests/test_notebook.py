"""The notebooks run from top to bottom, say what they claim, and are stored without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))

# tqdm, which NumPyro imports, misses ipywidgets: its bars would be plainer, and the notebook shows none.
ALLOWED = ("TqdmWarning",)

# The last cell of the executed copy: what the notebook's own variables hold.
PROBE = """
import json
shares = {m: results[f"policy.smoke.tokens.{m}.true_share"] for m in config.methods}
print(json.dumps({"holds": correlation, "breaks": broken_correlation, "shares": shares, "workdir": str(workdir)}))
"""

# Put behind the knobs of alignment.ipynb: the same recipes, too small to show more than that they run.
SMALL = """
simulation = Newsroom(articles=60, weeks=5, topics=8)
width, samples = 16, 64
sft = Sft(steps=40, batch=32, learning_rate=1e-2)
dpo = Dpo(steps=8, groups=8, learning_rate=2e-3)
best_of_n = BestOfN(sizes=(1, 4, 16, 64))
align = Align(evaluate_every=4, accept_risk=True)  # a toy log identifies nothing
"""
ALIGNED = """
import json
known = {"along": along, "best": {name: [p._asdict() for p in points] for name, points in best.items()}}
print(json.dumps(known | {"compilations": stage.traces(), "workdir": str(workdir)}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """demo.ipynb after all its cells ran, the variables of `PROBE`, and its folder."""
    return _execute("demo", PROBE, tmp_path_factory.mktemp("notebook"))


@pytest.fixture(scope="module")
def aligned(tmp_path_factory):
    """alignment.ipynb at toy size, the variables of `ALIGNED`, and its folder."""
    return _execute("alignment", ALIGNED, tmp_path_factory.mktemp("notebook"), {"knobs": SMALL})


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_no_outputs_and_no_counts_in_git(path):
    stored = json.loads(path.read_text())
    assert stored["nbformat"] == 4 and stored["metadata"]["kernelspec"]["name"] == "python3"
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {cell['id']}: clear the outputs before the commit"
            assert cell["execution_count"] is None, f"cell {cell['id']}: clear the counts before the commit"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_first_code_cell_installs_nothing_by_itself(path):
    first = next(c for c in json.loads(path.read_text())["cells"] if c["cell_type"] == "code")
    lines = "".join(first["source"]).splitlines()
    assert any("%pip install" in line for line in lines)
    assert all(line.startswith("#") for line in lines)


def test_deconfounded_is_above_naive_where_the_assumptions_hold(executed):
    holds = executed[1]["holds"]
    assert holds["deconfounded"] > holds["naive"] + 0.1, holds


def test_and_below_it_where_exclusion_fails(executed):
    breaks = executed[1]["breaks"]
    assert breaks["deconfounded"] < breaks["naive"] - 0.1, breaks


def test_every_policy_of_the_run_was_judged(executed):
    _, probe, folder = executed
    assert set(probe["shares"]) == {"naive", "covariate", "deconfounded"}
    assert all(np.isfinite(share) for share in probe["shares"].values())
    assert Path(probe["workdir"]).is_relative_to(folder), "the default folder must be a temporary one"


def test_tables_and_plots_are_shown_and_nothing_warns(executed):
    shown, warned = _shown(executed[0])
    assert shown.count("text/markdown") == 3 and shown.count("image/png") == 2
    assert not warned, warned


def test_both_recipes_climb_their_own_reward_and_leave_the_reference(aligned):
    notebook, probe, folder = aligned
    assert set(probe["along"]) == set(probe["best"]) == {"naive", "deconfounded"} and probe["compilations"] == 1
    for rows in probe["along"].values():
        assert [row["step"] for row in rows] == [0, 4, 8] and abs(rows[0]["kl"]) < 1e-4 < 0.02 < rows[-1]["kl"]
        assert rows[-1]["proxy"] > rows[0]["proxy"] + 0.1
        assert all(np.isfinite(row["truth"]) for row in rows)
    for points in probe["best"].values():
        assert [p["n"] for p in points][-1] == 64 and np.all(np.diff([p["proxy"] for p in points]) > 0)
    shown, warned = _shown(notebook)
    assert shown.count("image/png") == 1 and not warned, warned
    assert Path(probe["workdir"]).is_relative_to(folder)


def _execute(name: str, probe: str, folder: Path, inserted: dict[str, str] | None = None):
    """A notebook after all its cells ran, what the code `probe` printed behind them, and the folder it ran in.

    Args:
      inserted: code that runs right behind the cell of an id.
    """
    nbclient = pytest.importorskip("nbclient", reason="nbclient executes the notebook; the test extra has it")
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook; the test extra has it")
    pytest.importorskip("ipykernel", reason="ipykernel is the notebook's kernel; the test extra has it")
    notebook = nbformat.read(ROOT / "notebooks" / f"{name}.ipynb", as_version=4)
    for before, source in (inserted or {}).items():
        place = next(i for i, cell in enumerate(notebook.cells) if cell["id"] == before)
        notebook.cells.insert(place + 1, nbformat.v4.new_code_cell(source))
    notebook.cells.append(nbformat.v4.new_code_cell(probe))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=_environment(folder))
    found = notebook.cells.pop()
    return notebook, json.loads(found.outputs[0]["text"]), folder


def _shown(notebook) -> tuple[list[str], list[str]]:
    """Types of what the cells show, and lines that warn."""
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    errors = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    return shown, [line for line in errors.splitlines() if "Warning" in line and not any(a in line for a in ALLOWED)]


def _environment(folder: Path) -> dict[str, str]:
    """conftest's other settings, for the process of the kernel; its temporary files stay in the folder."""
    return os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
    }
