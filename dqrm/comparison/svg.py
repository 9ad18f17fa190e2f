"""Pictures as inline SVG whose colours come from the page's style, so that they follow its theme.

A picture is drawn in units of one CSS pixel at its natural width, and shrinks with the page.
"""

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from html import escape

from dqrm.comparison.scales import Scale
from dqrm.text import shortened

WIDTH = 430.0
HEIGHT = 300.0
_TOP, _BOTTOM, _RIGHT = 12.0, 44.0, 14.0
_ROW = 22.0
_LETTER = 6.6
"""Mean width of a letter at the size of labels."""

COLOURS = 8
"""Of groups, in the page's style."""

Point = tuple[float, float]
Text = Callable[[float], str]


@dataclass
class Canvas:
    """A plot with two axes.

    Args:
        x: of the horizontal axis.
        y: of the vertical one.
        x_title: below the axis.
        y_title: above the plot.
        x_text: how ticks of x are written.
        y_text: how ticks of y are written.
    """

    x: Scale
    y: Scale
    x_title: str
    y_title: str
    x_text: Text
    y_text: Text
    _parts: list[str] = field(default_factory=list)

    def __post_init__(self) -> None:
        longest = max((len(self.y_text(tick)) for tick in self.y.ticks), default=4)
        self._left = 14.0 + _LETTER * longest
        self._head = _TOP + 14.0

    def line(self, points: Sequence[Point], group: int, *, faint: bool = False) -> None:
        """Draw a line through points of a group."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._at, points))
        style = " faint" if faint else ""
        self._parts.append(f'<polyline {_style("line" + style, group)} points="{path}"/>')

    def dot(
        self, point: Point, group: int, label: str, *, radius: float = 4.5, ring: bool = False
    ) -> None:
        """Draw a point of a group, which says ``label`` under the pointer; or a ring around it."""
        x, y = self._at(point)
        kind = "ring" if ring else "dot"
        self._parts.append(
            f'<circle {_style(kind, group)} cx="{x:.1f}" cy="{y:.1f}" r="{radius:g}">'
            f"<title>{escape(label)}</title></circle>"
        )

    def bar(self, low: Point, high: Point, group: int) -> None:
        """Draw a thin line of a group, such as the error of a point."""
        (x1, y1), (x2, y2) = self._at(low), self._at(high)
        place = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
        self._parts.append(f"<line {_style('error', group)} {place}/>")

    def guide(self, points: Sequence[Point]) -> None:
        """Draw a dashed line that belongs to no group."""
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in map(self._at, points))
        self._parts.append(f'<polyline class="guide" points="{path}"/>')

    def svg(self, label: str) -> str:
        """Return the picture; ``label`` says what it shows to those who do not see it."""
        bottom = HEIGHT - _BOTTOM
        parts = [_text(0.0, _TOP, self.y_title, "title")]
        for tick in self.y.ticks:
            y = self._at((self.x.low, tick))[1]
            parts.append(_rule(self._left, y, WIDTH - _RIGHT, y))
            parts.append(_text(self._left - 6, y + 4, self.y_text(tick), "tick end"))
        for tick in self.x.ticks:
            x = self._at((tick, self.y.low))[0]
            parts.append(_rule(x, bottom, x, bottom + 4, "axis"))
            parts.append(_text(x, bottom + 17, self.x_text(tick), "tick middle"))
        parts.append(_rule(self._left, bottom, WIDTH - _RIGHT, bottom, "axis"))
        middle = (self._left + WIDTH - _RIGHT) / 2
        parts.append(_text(middle, HEIGHT - 6, self.x_title, "title middle"))
        return _svg(WIDTH, HEIGHT, label, [*parts, *self._parts])

    def _at(self, point: Point) -> Point:
        x, y = self.x.place(point[0]), self.y.place(point[1])
        left, bottom = self._left, HEIGHT - _BOTTOM
        return left + x * (WIDTH - _RIGHT - left), bottom - y * (bottom - self._head)


@dataclass(frozen=True)
class Mark:
    """A point in a row of a dot plot."""

    value: float
    group: int
    label: str


def rows_svg(
    rows: Sequence[tuple[str, Sequence[Mark]]],
    scale: Scale,
    title: str,
    text: Text,
    label: str,
    guide: float | None = None,
) -> str:
    """Return a plot with a named row for each entry and its marks along the scale.

    Args:
        rows: names and marks, from top to bottom.
        scale: of the values.
        title: below the axis.
        text: how ticks are written.
        label: says what the picture shows to those who do not see it.
        guide: a value to draw a dashed line at.
    """
    longest = max(min(len(name), _NAME_LETTERS) for name, _ in rows)
    left = 14.0 + _LETTER * longest
    height = _TOP + _ROW * len(rows) + _BOTTOM
    bottom = height - _BOTTOM

    def at(value: float) -> float:
        return left + scale.place(value) * (WIDTH - _RIGHT - left)

    parts = []
    for tick in scale.ticks:
        parts.append(_rule(at(tick), _TOP - 4, at(tick), bottom))
        parts.append(_text(at(tick), bottom + 17, text(tick), "tick middle"))
    if guide is not None:
        x = at(guide)
        parts.append(f'<polyline class="guide" points="{x:.1f},{_TOP - 4} {x:.1f},{bottom}"/>')
    for number, (name, marks) in enumerate(rows):
        y = _TOP + _ROW * (number + 0.5)
        parts.append(_text(left - 8, y + 4, shortened(name, _NAME_LETTERS), "tick end", name))
        if len(marks) > 1:
            ends = [at(mark.value) for mark in marks]
            parts.append(_rule(min(ends), y, max(ends), y, "span"))
        for mark in marks:
            parts.append(
                f'<circle {_style("dot", mark.group)} cx="{at(mark.value):.1f}" cy="{y:.1f}" '
                f'r="4.5"><title>{escape(mark.label)}</title></circle>'
            )
    parts.append(_rule(left, bottom, WIDTH - _RIGHT, bottom, "axis"))
    middle = statistics.mean((left, WIDTH - _RIGHT))
    parts.append(_text(middle, height - 6, title, "title middle"))
    return _svg(WIDTH, height, label, parts)


_NAME_LETTERS = 24


def colour_class(group: int) -> str:
    """Return the class that gives a group its colour; there are eight, then they come again."""
    return f"g{group % COLOURS}" + (" again" if group >= COLOURS else "")


def _style(kind: str, group: int) -> str:
    return f'class="{kind} {colour_class(group)}" data-group="{group}"'


def _svg(width: float, height: float, label: str, parts: Sequence[str]) -> str:
    inside = "\n".join(parts)
    return (
        f'<svg viewBox="0 0 {width:g} {height:g}" role="img" aria-label="{escape(label)}">\n'
        f"{inside}\n</svg>"
    )


def _text(x: float, y: float, text: str, kind: str, whole: str | None = None) -> str:
    title = f"<title>{escape(whole)}</title>" if whole not in (None, text) else ""
    return f'<text class="{kind}" x="{x:.1f}" y="{y:.1f}">{escape(text)}{title}</text>'


def _rule(x1: float, y1: float, x2: float, y2: float, kind: str = "grid") -> str:
    return f'<line class="{kind}" x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"/>'
