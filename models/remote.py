"""The one file beside a saved hybrid that loads it where evalkit is not installed (``trust_remote_code=True``).

transformers copies a remote file and its flat relative imports only, so the file is the model's own sources, one after
another. Imports of each other are taken out; what stays in evalkit (the kernels) is imported when it is called for.
"""

import ast
import importlib
import inspect
import re
from pathlib import Path

REMOTE_FILE = "modeling_hybrid_kda.py"
AUTO_MAP = {
    "AutoConfig": "modeling_hybrid_kda.HybridKDAConfig",
    "AutoModelForCausalLM": "modeling_hybrid_kda.HybridKDAForCausalLM",
}
SOURCES = ("models.hybrid_config", "models.kda.reference", "models.kda.api", "models.kda.layer", "models.hybrid")
"""In the order in which they need each other."""
OWN = ("default_impl", "AUTO_MAP", "write_remote_file")
"""Names that the file defines for itself, in PRELUDE."""

PRELUDE = '''
AUTO_MAP = {auto_map!r}


def evalkit_part(module, name):
    """What only evalkit has."""
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ImportError(f"{{module}}.{{name}} is a part of evalkit: install it, or use impl='reference'") from error


@functools.cache
def has_kernels():
    try:
        found = importlib.util.find_spec("models.kda.kernels") is not None
    except ImportError:
        found = False
    if not found:
        warnings.warn(
            "KDA runs in plain PyTorch on this GPU: evalkit, which has its Triton kernels, is not installed",
            stacklevel=2,
        )
    return found


def default_impl(x):
    return "triton" if x.is_cuda and has_kernels() else "reference"


def write_remote_file(folder):
    if Path(folder).resolve() != Path(__file__).resolve().parent:
        shutil.copyfile(__file__, Path(folder) / {file!r})
'''
PRELUDE_IMPORTS = ("functools", "importlib", "importlib.util", "shutil", "warnings")


def write_remote_file(folder: str | Path) -> None:
    """Write ``modeling_hybrid_kda.py`` into a model's folder."""
    (Path(folder) / REMOTE_FILE).write_text(remote_source(), encoding="utf-8")


def remote_source() -> str:
    """The text of the file."""
    imports = {f"import {name}" for name in PRELUDE_IMPORTS}
    parts, defined = [], set(OWN)
    for name in SOURCES:
        text = inspect.getsource(importlib.import_module(name))
        for own in _defined(ast.parse(text)) - set(OWN):
            assert own not in defined, f"{own} is defined in two of the files that become one; rename it in {name}"
            defined.add(own)
        parts.append(f"# {name.replace('.', '/')}.py\n{_standalone(text, imports)}")
    head = f'"""HybridKDAForCausalLM in one file (Apache-2.0), written by evalkit from {", ".join(SOURCES)}."""'
    prelude = PRELUDE.format(auto_map=AUTO_MAP, file=REMOTE_FILE)
    return "\n\n".join([head, "\n".join(sorted(imports)), prelude.strip(), *parts]) + "\n"


def _standalone(text: str, imports: set[str]) -> str:
    """``text`` without its top-level imports, which are added to ``imports``, and without what the prelude defines."""
    tree = ast.parse(text)
    edits: list[tuple[ast.AST, str]] = []
    modules: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.Import, ast.ImportFrom)):
            edits.append((node, ""))
            if not _ours(node):
                imports.add(ast.unparse(node))
            elif isinstance(node, ast.ImportFrom):
                modules |= {a.asname or a.name for a in node.names if f"{node.module}.{a.name}" in SOURCES}
        elif _registers(node) or (isinstance(node, ast.FunctionDef) and node.name in OWN):
            edits.append((node, ""))
        else:
            edits += [(inner, _late(inner)) for inner in ast.walk(node) if _ours(inner)]
    for use in ast.walk(tree):
        if isinstance(use, ast.Attribute) and isinstance(use.value, ast.Name) and use.value.id in modules:
            edits.append((use, use.attr))
    return re.sub(r"\n{4,}", "\n\n\n", _edited(text, edits).strip())


def _ours(node: ast.AST) -> bool:
    return isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "models"


def _late(node: ast.AST) -> str:
    assert isinstance(node, ast.ImportFrom)
    return "; ".join(f'{a.asname or a.name} = evalkit_part("{node.module}", "{a.name}")' for a in node.names)


def _registers(node: ast.stmt) -> bool:
    """transformers registers remote classes itself."""
    call = node.value if isinstance(node, ast.Expr) else None
    return isinstance(call, ast.Call) and isinstance(call.func, ast.Attribute) and call.func.attr == "register"


def _edited(text: str, edits: list[tuple[ast.AST, str]]) -> str:
    data = text.encode()  # the tree counts bytes
    starts = [0]
    for line in data.splitlines(keepends=True):
        starts.append(starts[-1] + len(line))
    for node, new in sorted(edits, key=lambda edit: -starts[edit[0].lineno - 1] - edit[0].col_offset):  # type: ignore[attr-defined]
        begin = starts[node.lineno - 1] + node.col_offset  # type: ignore[attr-defined]
        end = starts[node.end_lineno - 1] + node.end_col_offset  # type: ignore[attr-defined]
        data = data[:begin] + new.encode() + data[end:]
    return data.decode()


def _defined(tree: ast.Module) -> set[str]:
    names: set[str] = set()
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)):
            names.add(node.name)
        elif isinstance(node, (ast.Assign, ast.AnnAssign)):
            names |= {
                inner.id for inner in ast.walk(node) if isinstance(inner, ast.Name) and isinstance(inner.ctx, ast.Store)
            }
    return names
