"""The folders' imports run one way, and `import evalkit` is light."""

import ast
import os
import subprocess
import sys
from pathlib import Path

import pytest

import evalkit

ROOT = Path(__file__).resolve().parents[2]
FOLDERS = ("evalkit", "tasks", "models", "distill", "reports")
ALLOWED = {
    "evalkit": set(),
    "models": set(),
    "tasks": {"evalkit"},
    "reports": {"evalkit"},
    "distill": {"models", "evalkit", "tasks"},
}
COMMANDS = {
    *("cli", "cli_bench", "cli_cache", "cli_distill", "cli_import", "cli_quantise", "cli_reports", "cli_sweep"),
    "commands",
}
OPENING = {"opening", "open_served", "open_vllm"}
EVERYTHING = {
    f"evalkit/{name}.py" for name in {"api", "api_reports", "naming", "running", "sweep"} | OPENING | COMMANDS
}
"""These may import every folder, inside functions."""
ONLY_FOR_TESTS = {name.removesuffix(".py").replace("/", ".") for name in EVERYTHING}


def imported(file: Path) -> set[str]:
    tree = ast.parse(file.read_text(encoding="utf-8"))
    names = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    return names | {node.module for node in ast.walk(tree) if isinstance(node, ast.ImportFrom) and node.module}


def test_imports_run_one_way() -> None:
    for folder in FOLDERS:
        for file in (ROOT / folder).rglob("*.py"):
            name = str(file.relative_to(ROOT))
            tops = {module.partition(".")[0] for module in imported(file)} & set(FOLDERS) - {folder}
            assert name in EVERYTHING or tops <= ALLOWED[folder], f"{name} imports {tops - ALLOWED[folder]}"
            if name not in {"evalkit/__init__.py", "evalkit/__main__.py", *EVERYTHING}:
                assert not imported(file) & ONLY_FOR_TESTS, f"{name} imports the API or the commands"


def test_inside_evalkit_imports_run_one_way() -> None:
    ranks = [
        {"records"},
        {"registry", "settings", "views", "markers", "numerals", "options", "yaml12"},
        {"encoding", "extract", "requests", "engines", "scoring", "selection", "stats"},
        {"evaluate", "store", "progress", "bridge", "forced"},
        {"rescore", "responses", "naming", "bench_engine", *OPENING},
        {"running"},
        {"api", "api_reports", "sweep", "__init__", "__main__", *COMMANDS},
    ]
    rank = {name: at for at, names in enumerate(ranks) for name in names}
    for file in (ROOT / "evalkit").rglob("*.py"):
        own = file.relative_to(ROOT / "evalkit").parts[0].removesuffix(".py")
        for module in imported(file):
            if module.startswith("evalkit."):
                other = module.split(".")[1]
                assert rank[other] <= rank[own], f"evalkit/{own} imports evalkit.{other}, which comes after it"


def test_no_submodule_is_named_like_a_public_function() -> None:
    modules = {file.stem for file in (ROOT / "evalkit").glob("*.py")}
    assert not modules & set(evalkit.__all__)


def test_the_command_line_starts_without_what_only_its_commands_need() -> None:
    code = "import evalkit.commands, sys; print(*sorted({'torch', 'pydantic', 'yaml', 'datasets'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True).stdout == "\n"


def test_import_evalkit_is_light() -> None:
    code = (
        "import evalkit, sys; heavy = {'torch', 'transformers', 'datasets', 'scipy'}; "
        "folders = {'tasks', 'models', 'reports', 'distill'}; print(*sorted((heavy | folders) & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (done.returncode, done.stdout.strip(), done.stderr) == (0, "", "")


@pytest.mark.parametrize("name", ["tasks", "models", "distill", "reports"])
def test_a_shadowing_package_is_named_with_its_path(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text("")
    script = Path(sys.executable).parent / "evalkit"
    commands: list[list[str]] = [[sys.executable, "-c", "import evalkit"], [sys.executable, "-m", "evalkit", "tasks"]]
    if script.exists():
        commands.append([str(script), "tasks"])
    for command in commands:
        environment = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
        done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=environment)
        assert f"another package named {name!r} at {tmp_path / name} shadows" in done.stderr
        if command[1] == "-c":
            assert done.returncode == 1, "a program that imports evalkit gets the ImportError"
        else:
            assert (done.returncode, len(done.stderr.splitlines())) == (2, 1), "a user gets one line"
