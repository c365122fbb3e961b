"""The tree's own rules, read from its source: who imports whom, where third parties live, how long things get.

The table is the design's: a module imports from lower layers and from its own folder, never sideways.
"""

from __future__ import annotations

import ast
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

ROOT = Path(__file__).resolve().parents[1]
CODE = ("deconfound_jax", "experiments", "tests")

# Folder or file -> layer. `saved` reads a finished run, so it stands on everything but the scripts; the package's
# own __init__ ("deconfound_jax") hands out names of all of them, lazily.
LAYERS = {
    **{"design": 0, "structs": 0, "config": 0},
    **{"causal": 1, "models": 1, "simulate": 1},
    **{"logs": 2, "align": 3, "train": 4, "recipes": 5},
    **{"evaluate": 6, "report": 6, "saved": 6.5, "deconfound_jax": 6.75, "experiments": 7},
}
INSIDE_A_LAYER = {("config", "structs"), ("structs", "design")}  # plain data holds plain data

# Third party -> the modules (prefixes, below deconfound_jax) that may import it when they are imported themselves.
HOMES = {
    "numpyro": ("causal",),
    "flax.linen": ("models",),
    "tokenizers": ("models",),
    "safetensors": ("models",),
    "gguf": ("models",),
    "huggingface_hub": ("models",),
    "duckdb": ("logs",),
    "tensorflow_datasets": ("logs",),
    "grain": ("logs",),
    "orbax": ("train",),
    "optax": ("causal", "align", "train"),
    "jinja2": ("report", "models.chat"),
    "matplotlib": ("report",),
    "tyro": (),
    "rich": (),
}
SCRIPTS_ONLY = {"tyro", "rich"}  # inside functions, and only of experiments

# An accelerator image may lack these. Not rich: flax.linen itself imports it.
ABSENT = {
    *"duckdb gguf grain huggingface_hub jinja2 matplotlib safetensors tensorflow_datasets tokenizers tyro".split()
}
CORE_LAYERS = {0, 1, 3, 4, 5}
FILE_FORMATS = {"deconfound_jax.models.encoder"}  # it reads a tokenizer's file

MAX_FILE_LINES, MAX_FUNCTION_LINES = 300, 45
LONG_FILES: dict[str, str] = {}  # "folder/file.py" -> why it may be longer
LONG_FUNCTIONS: dict[str, str] = {
    "tests/test_report.py:full_page": "one literal page with every section: a table, no logic"
}  # "folder/file.py:name" -> why it may be longer
REFUSED_NAMES = {"utils.py", "types.py", "logging.py", "optax.py"}  # a drawer for everything, or a library's name

MACHINE_PATH = re.compile(rb"(?<![\w.~/\-})>])/(?:work|root|home|Users)/")
DATA_SUFFIXES = {".pkl", ".pickle", ".joblib", ".npz", ".pt", ".pth"}
UNTRACKED_FOLDERS = re.compile(r"\.(?!ci$)|(build|dist|runs|__pycache__)$|.*\.egg-info$")


class Import(NamedTuple):
    """One imported name: `flax.linen` for `from flax import linen`. place: module, typing or function."""

    name: str
    line: int
    place: str


def read_modules() -> dict[str, Path]:
    """Dotted name -> file, of the package and the scripts."""
    paths = [path for folder in ("deconfound_jax", "experiments") for path in sorted((ROOT / folder).rglob("*.py"))]
    return {".".join(path.relative_to(ROOT).with_suffix("").parts): path for path in paths}


def read_imports(source: str, module: str) -> list[Import]:
    """Every import statement of `module`, relative ones resolved."""

    def visit(node: ast.AST, place: str) -> Iterator[Import]:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.Import):
                yield from (Import(alias.name, child.lineno, place) for alias in child.names)
            elif isinstance(child, ast.ImportFrom):
                above = module.split(".")[: -child.level] if child.level else []
                base = ".".join([*above, *([child.module] if child.module else [])])
                yield from (Import(f"{base}.{alias.name}", child.lineno, place) for alias in child.names)
            elif isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                yield from visit(child, "function")
            elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
                yield from visit(child, "typing")
            else:
                yield from visit(child, place)

    return list(visit(ast.parse(source), "module"))


def unit_of(name: str) -> str | None:
    """The row of the layer table that a dotted name belongs to; None for a third party."""
    first, *rest = name.split(".")
    if first != "deconfound_jax":
        return first if first == "experiments" else None
    return rest[0] if rest and rest[0] in LAYERS else first


def uphill(source: str, module: str) -> list[str]:
    """Imports that go up or sideways, as sentences."""
    own, found = unit_of(module), []
    for name, line, _ in read_imports(source, module):
        target = unit_of(name)
        if target in (None, own) or (own, target) in INSIDE_A_LAYER or LAYERS[target] < LAYERS[own]:
            continue
        found.append(f"{module}:{line}: {own} (layer {LAYERS[own]}) imports {name} (layer {LAYERS[target]})")
    return found


def homeless(source: str, module: str) -> list[str]:
    """Third parties imported outside their home, as sentences."""
    place_of_module, found = module.removeprefix("deconfound_jax."), []
    for name, line, place in read_imports(source, module):
        party = next((party for party in HOMES if f"{name}.".startswith(f"{party}.")), None)
        if party is None:
            continue
        at_home = any(f"{place_of_module}.".startswith(f"{home}.") for home in HOMES[party])
        if party in SCRIPTS_ONLY and unit_of(module) != "experiments":
            found.append(f"{module}:{line}: {party} belongs into functions of experiments")
        elif place == "module" and not at_home:
            found.append(f"{module}:{line}: {party} at module level; its home: {HOMES[party] or 'inside functions'}")
    return found


def long_functions(source: str) -> dict[str, int]:
    """Name -> lines, docstring excluded, of every function over the limit."""
    found = {}
    for node in ast.walk(ast.parse(source)):
        if not isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            continue
        lines = node.end_lineno - node.lineno + 1
        if ast.get_docstring(node) is not None:
            lines -= node.body[0].end_lineno - node.body[0].lineno + 1
        if lines > MAX_FUNCTION_LINES:
            found[node.name] = lines
    return found


def repository_files() -> list[Path]:
    """What git tracks or would add; without git, everything outside hidden and built folders."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    if shutil.which("git"):
        listed = subprocess.run(command, cwd=ROOT, capture_output=True, text=True).stdout.split("\0")
        if paths := [ROOT / name for name in listed if name and (ROOT / name).is_file()]:
            return paths
    found = []
    for folder, names, files in os.walk(ROOT):
        names[:] = sorted(name for name in names if not UNTRACKED_FOLDERS.match(name))
        found += [Path(folder, name) for name in sorted(files)]
    return found


def run_python(code: str, **environment: str) -> None:
    """Runs code in a fresh interpreter; its traceback is the failure's message."""
    variables = {**os.environ, **environment}
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=variables, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]


def test_every_module_has_a_layer():
    units = {name.removeprefix("deconfound_jax.").split(".")[0] for name in read_modules()} - {"__init__"}
    assert units <= set(LAYERS), f"no layer for {sorted(units - set(LAYERS))}: add it to LAYERS and to the design"
    folders = {path.parent for path in read_modules().values()}
    bare = [str(folder.relative_to(ROOT)) for folder in folders if not (folder / "__init__.py").exists()]
    assert not bare, f"an installed package would lack {bare}: each needs an __init__.py"


def test_imports_go_downhill():
    assert not [wrong for name, path in read_modules().items() for wrong in uphill(path.read_text(), name)]


def test_third_parties_stay_at_home():
    assert not [wrong for name, path in read_modules().items() for wrong in homeless(path.read_text(), name)]


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("deconfound_jax.causal.fit", "from deconfound_jax.logs.read import read"),  # up
        ("deconfound_jax.causal.fit", "from deconfound_jax import models"),  # sideways
        ("deconfound_jax.causal.fit", "from deconfound_jax import Posterior"),  # the package's front door
        ("deconfound_jax.align.losses.dpo", "from ...recipes import sft"),
        ("deconfound_jax.align.losses.dpo", "def f():\n    import deconfound_jax.train.loop"),  # lazily, still up
        ("deconfound_jax.evaluate.ab", "import deconfound_jax.report.page"),
        ("deconfound_jax.structs", "from deconfound_jax.config import Split"),
        ("deconfound_jax.recipes.reference", "from deconfound_jax.saved import load"),
        ("deconfound_jax.saved", "from experiments import align"),
    ],
)
def test_an_uphill_import_is_seen(module, statement):
    assert len(uphill(statement, module)) == 1


@pytest.mark.parametrize(
    ("module", "statement"),
    [
        ("deconfound_jax.config.run", "from deconfound_jax.structs import Roles"),
        ("deconfound_jax.align.losses.dpo", "from ..logprobs import token_logprob"),
        ("deconfound_jax.saved", "from deconfound_jax import report"),
        ("deconfound_jax.__init__", "def __getattr__(name):\n    from deconfound_jax import saved"),
        ("experiments.align", "import deconfound_jax\nfrom experiments.presets import newsroom"),
    ],
)
def test_a_downhill_import_passes(module, statement):
    assert not uphill(statement, module)


@pytest.mark.parametrize(
    ("module", "statement", "wrong"),
    [
        ("deconfound_jax.align.joint", "from numpyro.infer import SVI", 1),
        ("deconfound_jax.train.step", "from flax import linen as nn", 1),
        ("deconfound_jax.train.step", "if True:\n    import duckdb", 1),
        ("deconfound_jax.train.step", "import optax, orbax.checkpoint", 0),
        ("deconfound_jax.logs.check", "def f():\n    import safetensors", 0),
        ("deconfound_jax.logs.check", "if TYPE_CHECKING:\n    import matplotlib", 0),
        ("deconfound_jax.models.chat", "import jinja2", 0),
        ("deconfound_jax.models.weights", "import jinja2", 1),
        ("deconfound_jax.logs.read", "def f():\n    import rich.progress", 1),
        ("experiments.align", "import tyro", 1),
        ("experiments.align", "def main():\n    import tyro", 0),
    ],
)
def test_a_third_party_out_of_place_is_seen(module, statement, wrong):
    assert len(homeless(statement, module)) == wrong


def test_the_front_door_loads_nothing():
    run_python(
        "import sys; before = set(sys.modules); import deconfound_jax\n"
        "new = {name.partition('.')[0] for name in set(sys.modules) - before} - sys.stdlib_module_names\n"
        "assert new == {'deconfound_jax'}, f'import deconfound_jax also loads {sorted(new)}'"
    )


def test_imports_create_no_array():
    # With a platform that does not exist, the first array raises and the traceback names its line.
    names = [name.removesuffix(".__init__") for name in read_modules() if not name.endswith("__main__")]
    run_python(f"import importlib\nfor name in {names}:\n    importlib.import_module(name)", JAX_PLATFORMS="none")
    with pytest.raises(AssertionError, match="none"):
        run_python("import jax.numpy as jnp; jnp.zeros(1)", JAX_PLATFORMS="none")


def test_core_layers_need_no_file_formats_and_no_command_line():
    core = {name for name in read_modules() if LAYERS[unit_of(name)] in CORE_LAYERS} - FILE_FORMATS
    run_python(f"""
import importlib, sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] in {ABSENT}:
            raise ModuleNotFoundError(f"{{name}} is absent here", name=name)
sys.meta_path.insert(0, Absent())
for name in {sorted(name.removesuffix(".__init__") for name in core)}:
    importlib.import_module(name)
""")


def test_files_and_functions_are_short():
    files, functions = {}, {}
    for path in [path for folder in CODE for path in sorted((ROOT / folder).rglob("*.py"))]:
        name, source = str(path.relative_to(ROOT)), path.read_text()
        assert path.name not in REFUSED_NAMES, f"{name}: give it the name of what it holds"
        functions |= {f"{name}:{function}": lines for function, lines in long_functions(source).items()}
        if (lines := len(source.splitlines())) > MAX_FILE_LINES:
            files[name] = lines
    assert files.keys() == LONG_FILES.keys(), f"lines over {MAX_FILE_LINES}, in or out of LONG_FILES: {files}"
    assert functions.keys() == LONG_FUNCTIONS.keys(), f"lines over {MAX_FUNCTION_LINES}: {functions}"


def test_a_long_function_is_seen_without_its_docstring():
    body = "    x = 1\n" * (MAX_FUNCTION_LINES - 1)
    assert not long_functions(f'def f():\n    """One.\n\n    Two.\n    """\n{body}')
    assert long_functions(f"def f():\n{body}    return x\n") == {"f": MAX_FUNCTION_LINES + 1}


def test_no_file_names_a_machine_or_is_a_pickle():
    assert MACHINE_PATH.search(b'open("/%s/x")' % b"work")
    assert not MACHINE_PATH.search(b"../%s/x" % b"work")
    for path in repository_files():
        content = path.read_bytes()
        found = MACHINE_PATH.search(content)
        assert found is None, f"{path.relative_to(ROOT)}: a path of one machine: {found[0].decode()}"
        pickled = content[:1] == b"\x80" and content[-1:] == b"."
        assert path.suffix not in DATA_SUFFIXES and not pickled, f"{path.relative_to(ROOT)}: data as a pickle or .npz"
