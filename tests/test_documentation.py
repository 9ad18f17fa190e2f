"""README and docs/: links lead somewhere, and the commands in them exist with their options."""

import re
import shlex
from pathlib import Path

import click
import pytest

from dqrm.cli import cli

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]

pages = pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)


def prose(text: str) -> str:
    return re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)


def anchors(page: Path) -> set[str]:
    """What GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", prose(page.read_text(encoding="utf-8")), re.MULTILINE)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(text: str) -> list[str]:
    """Lines of shell blocks and code within sentences that call dqrm."""
    shell = re.findall(r"^```sh\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    lines = [line for block in shell for line in block.replace("\\\n", " ").splitlines()]
    lines += re.findall(r"`(dqrm [^`]+)`", prose(text))
    parts = [part.strip() for line in lines for part in line.split(";")]
    return [part for part in parts if re.match(r"(\S*/)?dqrm |.* -m dqrm ", part)]


def fault(words: list[str]) -> str | None:
    """What of a command line after ``dqrm`` does not exist."""
    command: click.Command = cli
    while isinstance(command, click.Group) and words and not words[0].startswith("-"):
        name, *words = words
        found = command.get_command(click.Context(command), name.split("|")[0])
        if found is None:
            return f"no command {name}"
        command = found
    known = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    given = [word.partition("=")[0] for word in words if word.startswith("-")]
    unknown = [name for name in given if name not in known | {"-h", "--help"}]
    return f"no options {unknown} of {command.name}" if unknown else None


def links(page: Path) -> list[str]:
    """Targets within the checkout."""
    targets = re.findall(r"\]\(([^)\s]+)\)", prose(page.read_text(encoding="utf-8")))
    return [target for target in targets if not target.startswith("https://")]


def test_the_readme_leads_to_every_page():
    named = {target.partition("#")[0] for target in links(ROOT / "README.md")}
    assert {f"docs/{page.name}" for page in PAGES[1:]} <= named


@pages
def test_links_lead_somewhere(page):
    for target in links(page):
        name, _, anchor = target.partition("#")
        led_to = (page.parent / name).resolve() if name else page
        assert led_to.is_file(), target
        if anchor:
            assert anchor in anchors(led_to), target


@pages
def test_commands_and_their_options_exist(page):
    found = commands(page.read_text(encoding="utf-8"))
    assert found
    for line in found:
        words = shlex.split(line, comments=True)
        at = next(number for number, word in enumerate(words) if Path(word).name == "dqrm")
        assert fault(words[at + 1 :]) is None, line
