"""A report of headings, paragraphs, tables and pictures, as Markdown and as one HTML file."""

import base64
import html
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

_STYLE = """
body { font: 16px/1.5 system-ui, sans-serif; max-width: 72rem; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.6rem; } h2 { font-size: 1.25rem; margin-top: 2rem; }
div.wide { overflow-x: auto; margin: 1rem 0; }
table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: 0.9rem; }
th, td { padding: 0.25rem 0.7rem; text-align: right; border-bottom: 1px solid #ddd; }
th { vertical-align: bottom; }
th:first-child, td:first-child { text-align: left; }
td { white-space: nowrap; }
p.verdict { border-left: 4px solid #1f77b4; padding-left: 0.8rem; font-weight: 600; }
img { max-width: 100%; height: auto; }
figcaption { color: #555; font-size: 0.9rem; }
figure { margin: 1.5rem 0; }
"""


@dataclass(frozen=True)
class Heading:
    """Of a section."""

    text: str


@dataclass(frozen=True)
class Paragraph:
    """Plain text; a verdict stands out."""

    text: str
    verdict: bool = False


@dataclass(frozen=True)
class Table:
    """Figures, the first column flush left."""

    header: tuple[str, ...]
    rows: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class Image:
    """A PNG file."""

    path: Path
    caption: str


Block = Heading | Paragraph | Table | Image


def to_markdown(title: str, blocks: Sequence[Block]) -> str:
    """Return the report; pictures are expected beside it."""
    parts = [f"# {title}"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"## {text}")
            case Paragraph(text, verdict):
                parts.append(f"**{text}**" if verdict else text)
            case Table(header, rows):
                lines = [header, ("---", *("---:" for _ in header[1:])), *rows]
                parts.append("\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines))
            case Image(path, caption):
                parts.append(f"![{caption}]({path.name})")
    return "\n\n".join(parts) + "\n"


def to_html(title: str, blocks: Sequence[Block]) -> str:
    """Return the report with everything in it: no other file is needed."""
    parts = [f"<h1>{html.escape(title)}</h1>"]
    for block in blocks:
        match block:
            case Heading(text):
                parts.append(f"<h2>{html.escape(text)}</h2>")
            case Paragraph(text, verdict):
                kind = ' class="verdict"' if verdict else ""
                parts.append(f"<p{kind}>{html.escape(text)}</p>")
            case Table(header, rows):
                head = _line("th", header)
                body = "\n".join(_line("td", row) for row in rows)
                parts.append(
                    f'<div class="wide"><table><thead>{head}</thead>'
                    f"<tbody>\n{body}\n</tbody></table></div>"
                )
            case Image(path, caption):
                data = base64.b64encode(path.read_bytes()).decode("ascii")
                text = html.escape(caption)
                parts.append(
                    f'<figure><img alt="{text}" src="data:image/png;base64,{data}">'
                    f"<figcaption>{text}</figcaption></figure>"
                )
    body = "\n".join(parts)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{html.escape(title)}</title><style>{_STYLE}</style></head>\n"
        f"<body>\n{body}\n</body></html>\n"
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _line(tag: str, cells: Sequence[str]) -> str:
    return "<tr>" + "".join(f"<{tag}>{html.escape(cell)}</{tag}>" for cell in cells) + "</tr>"
