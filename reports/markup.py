"""Our own Markdown as HTML: headings, paragraphs, lists, tables and `code`, as reports/ writes them, and no more.

One text serves both formats, so their figures can't differ. Whatever else a model's or a user's text holds is escaped.
"""

import html
import re

_CODE = re.compile(r"`([^`]+)`")


def to_html(markdown: str, level: int = 0) -> str:
    """``level`` is added to that of each heading."""
    return "\n".join(_block(block, level) for block in markdown.strip().split("\n\n") if block.strip())


def _block(block: str, level: int) -> str:
    heading = re.match(r"(#+) ", block)
    if heading:
        depth = min(6, len(heading[1]) + level)
        return f"<h{depth}>{_text(block[heading.end() :])}</h{depth}>"
    lines = block.split("\n")
    if len(lines) > 1 and block.startswith("| ") and lines[1].startswith("| ---"):
        return _table(lines)
    if block.startswith("* "):
        return f"<ul>{''.join(f'<li>{_text(line[2:])}</li>' for line in lines)}</ul>"
    return f"<p>{_text(block)}</p>"


def _table(lines: list[str]) -> str:
    numeric = [cell.endswith(":") for cell in _cells(lines[1])]

    def row(line: str, tag: str) -> str:
        kinds = [' class="number"' if at < len(numeric) and numeric[at] else "" for at in range(len(_cells(line)))]
        cells = zip(_cells(line), kinds, strict=True)
        return "<tr>" + "".join(f"<{tag}{kind}>{_text(cell)}</{tag}>" for cell, kind in cells) + "</tr>"

    body = "".join(row(line, "td") for line in lines[2:])
    return (
        '<div class="scroll" tabindex="0" role="region" aria-label="Table"><table><thead>'
        f"{row(lines[0], 'th')}</thead><tbody>{body}</tbody></table></div>"
    )


def _cells(line: str) -> list[str]:
    """Between the bars that are not escaped."""
    cells = [""]
    for part in re.findall(r"\\.|\||[^\\|]+", line.strip()):
        if part == "|":
            cells.append("")
        else:
            cells[-1] += part
    return [cell.strip() for cell in cells[1:-1]]


def _text(text: str) -> str:
    return _CODE.sub(r"<code>\1</code>", html.escape(plain(text)))


def plain(text: str) -> str:
    """Undo ``cells.inline``."""
    return re.sub(r"\\([\\|])", r"\1", text).replace("&lt;", "<")
