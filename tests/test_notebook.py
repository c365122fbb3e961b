"""The walkthrough notebook runs from top to bottom, says what it claims, and is stored without outputs."""

from __future__ import annotations

import json
import os
from pathlib import Path

import numpy as np
import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOK = ROOT / "notebooks" / "demo.ipynb"

# tqdm, which NumPyro imports, misses ipywidgets: its bars would be plainer, and the notebook shows none.
ALLOWED = ("TqdmWarning",)

# The last cell of the executed copy: what the notebook's own variables hold.
PROBE = """
import json
shares = {m: results[f"policy.smoke.tokens.{m}.true_share"] for m in config.methods}
print(json.dumps({"holds": correlation, "breaks": broken_correlation, "shares": shares, "workdir": str(workdir)}))
"""


@pytest.fixture(scope="module")
def executed(tmp_path_factory):
    """The notebook after all its cells ran, and the variables of `PROBE`."""
    nbclient = pytest.importorskip("nbclient", reason="nbclient executes the notebook; the test extra has it")
    nbformat = pytest.importorskip("nbformat", reason="nbformat reads the notebook; the test extra has it")
    pytest.importorskip("ipykernel", reason="ipykernel is the notebook's kernel; the test extra has it")
    folder = tmp_path_factory.mktemp("notebook")
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    notebook.cells.append(nbformat.v4.new_code_cell(PROBE))
    client = nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(folder)}}
    )
    client.execute(env=_environment(folder))
    probe = notebook.cells.pop()
    return notebook, json.loads(probe.outputs[0]["text"]), folder


def test_no_outputs_and_no_counts_in_git():
    stored = json.loads(NOTEBOOK.read_text())
    assert stored["nbformat"] == 4 and stored["metadata"]["kernelspec"]["name"] == "python3"
    for cell in stored["cells"]:
        if cell["cell_type"] == "code":
            assert cell["outputs"] == [], f"cell {cell['id']}: clear the outputs before the commit"
            assert cell["execution_count"] is None, f"cell {cell['id']}: clear the counts before the commit"


def test_the_first_code_cell_installs_nothing_by_itself():
    first = next(c for c in json.loads(NOTEBOOK.read_text())["cells"] if c["cell_type"] == "code")
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
    outputs = [output for cell in executed[0].cells for output in cell.get("outputs", [])]
    shown = [kind for output in outputs for kind in output.get("data", {})]
    assert shown.count("text/markdown") == 3 and shown.count("image/png") == 2
    errors = "".join(output["text"] for output in outputs if output.get("name") == "stderr")
    warned = [line for line in errors.splitlines() if "Warning" in line and not any(a in line for a in ALLOWED)]
    assert not warned, warned


def _environment(folder: Path) -> dict[str, str]:
    """conftest's other settings, for the process of the kernel; its temporary files stay in the folder."""
    return os.environ | {
        "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
        "JAX_NUMPY_RANK_PROMOTION": "raise",
        "PYTHONPATH": str(ROOT),
        "TMPDIR": str(folder),
        "IPYTHONDIR": str(folder / "ipython"),
    }
