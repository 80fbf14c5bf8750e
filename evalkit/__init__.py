"""evalkit: score language models by log-likelihood and by generation, and say what one hides of the other.

    import evalkit as ek
    teacher = ek.run("smollm2-135m", tasks=["quick"])
    student = ek.run("./student", tasks=["quick"])
    print(ek.compare(teacher, student).to_markdown())

Importing it loads neither torch nor the sibling folders.
"""

import importlib.util
import sys
from pathlib import Path

__version__ = "0.1.0"


def _name_shadows() -> None:
    """evalkit's folders have everyday names: say by name when another package took one, not by a strange error."""
    root = Path(__file__).resolve().parent.parent
    for name in ("tasks", "models", "distill", "reports"):
        found = importlib.util.find_spec(name)
        if found is None or not found.origin:
            raise ImportError(f"evalkit's package {name!r} is missing beside {root / 'evalkit'}; reinstall evalkit")
        if Path(found.origin).resolve().parent.parent != root:
            raise ImportError(
                f"another package named {name!r} at {Path(found.origin).parent} shadows evalkit's own in {root}; "
                f"install evalkit in an environment of its own (pipx, uv tool, or a virtual environment)"
            )


try:
    _name_shadows()
except ImportError as error:
    if Path(sys.argv[0]).name not in ("evalkit", "evalkit.exe", "-m"):
        raise
    print(f"evalkit: {error}", file=sys.stderr)  # the command's own main is not there yet to say it in one line
    raise SystemExit(2) from None

from evalkit.api import compare, import_run, load_run, run, tasks  # noqa: E402  (after the check that it depends on)
from evalkit.api_reports import check, rank  # noqa: E402

__all__ = ["__version__", "check", "compare", "import_run", "load_run", "rank", "run", "tasks"]
