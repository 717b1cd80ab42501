"""The rings of the house: what an import brings along, and that no import runs in a circle."""

import ast
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
TOP = {path.stem: path for path in ROOT.glob("*.py")}


def imported_by(path):
    """Top-level modules and folders of the project that a file imports, inside functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name.split(".")[0] for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            names.add(node.module.split(".")[0])
    return names


def test_the_top_level_imports_nothing_of_the_laboratory():
    assert not any({"experiments", "baselines"} & imported_by(path) for path in TOP.values())
    assert len(TOP) <= 15


def test_no_import_of_top_level_modules_runs_in_a_circle():
    left = {name: imported_by(path) & set(TOP) for name, path in TOP.items()}
    while left:
        free = [name for name, needs in left.items() if not needs & set(left)]
        assert free, f"a circle among {sorted(left)}"
        left = {name: needs for name, needs in left.items() if name not in free}


def test_the_method_loads_no_scene_no_drawing_and_no_trainer():
    code = (
        "import sys; sys.path.insert(0, '.'); import interventions, reference; "
        "print(sorted({'scm', 'tiny', 'train', 'report', 'runs', 'matplotlib'} & set(sys.modules)))"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"
