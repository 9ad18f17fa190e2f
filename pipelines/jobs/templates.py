"""Dates in a job's parameters: ``data/{{ yesterday }}``, ``{{ date - 7 days | %Y/%m/%d }}``.

Between the braces stands ``date`` (the day the run is scheduled for, in the time zone of the
schedule; also written ``run_date``), ``yesterday`` or ``tomorrow``, then ``+`` or ``-`` a number of
days or weeks if wanted, then ``|`` and a format of ``strftime`` if the date shall not read
2026-11-20. Nothing else is understood, and nothing else is let through.
"""

import difflib
import re
from datetime import date, timedelta

_SHIFTS = {"date": 0, "run_date": 0, "yesterday": -1, "tomorrow": 1}
_BRACES = re.compile(r"\{\{(.*?)\}\}", re.DOTALL)
_EXPRESSION = re.compile(
    r"\s*(?P<name>\w+)\s*(?:(?P<sign>[+-])\s*(?P<count>\d+)\s*(?P<unit>day|week)s?\s*)?"
    r"(?:\|\s*(?P<format>.*?)\s*)?"
)
_DIRECTIVES = re.compile(r"%(.?)", re.DOTALL)
# Those that a date has, and that read the same in every language of the machine.
_KNOWN_DIRECTIVES = "YymdjuGV%"


def render(text: str, day: date) -> str:
    """Put dates in place of what stands in double braces.

    Raises ValueError naming what is not understood.
    """
    rendered = _BRACES.sub(lambda match: _value(match[1], day), text)
    rest = _BRACES.sub("", text)
    if "{{" in rest or "}}" in rest:
        raise ValueError(f"'{text}': double braces that are not closed")
    return rendered


def _value(expression: str, day: date) -> str:
    match = _EXPRESSION.fullmatch(expression)
    shown = f"{{{{{expression}}}}}"
    if match is None:
        raise ValueError(
            f"{shown} is not understood; write such as {{{{ date - 7 days }}}} or "
            "{{ yesterday | %Y/%m/%d }}"
        )
    if match["name"] not in _SHIFTS:
        near = difflib.get_close_matches(match["name"], _SHIFTS, n=1)
        hint = f"did you mean {near[0]}?" if near else f"there are: {', '.join(_SHIFTS)}"
        raise ValueError(f"{shown}: nothing is called {match['name']}; {hint}")
    days = _SHIFTS[match["name"]]
    if match["count"]:
        count = int(match["count"]) * (7 if match["unit"] == "week" else 1)
        days += count if match["sign"] == "+" else -count
    form = match["format"]
    if form is not None:
        strange = [d for d in _DIRECTIVES.findall(form) if not d or d not in _KNOWN_DIRECTIVES]
        if strange or "%" not in form:
            known = " ".join(f"%{directive}" for directive in _KNOWN_DIRECTIVES)
            raise ValueError(f"{shown}: a format is made of {known} and plain text")
    try:
        value = day + timedelta(days=days)
    except OverflowError:
        raise ValueError(f"{shown}: there is no such date") from None
    return value.isoformat() if form is None else value.strftime(form)
