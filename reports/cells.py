"""Markdown tables that hold whatever text a model or a user gave."""

from collections.abc import Sequence


def table_of(headers: tuple[str, ...], rows: Sequence[tuple[str, ...]], left: int = 1) -> str:
    rule = ["---" if at < left else "---:" for at in range(len(headers))]
    body = ["| " + " | ".join(inline(cell) for cell in row) + " |" for row in rows]
    return "\n".join(["| " + " | ".join(headers) + " |", "| " + " | ".join(rule) + " |", *body])


def inline(text: str) -> str:
    """Text that may hold anything, safe in a table cell or a list."""
    return text.replace("\\", "\\\\").replace("|", "\\|").replace("<", "&lt;").replace("\n", " ")
