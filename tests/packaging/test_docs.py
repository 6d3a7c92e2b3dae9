"""What the documents say exists: links, targets, configuration fields, recipes, public names."""

from __future__ import annotations

import inspect
import re
import shlex
from pathlib import Path

import pytest

from stackwise import api_docs

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").glob("*.md")])


def mentions(pattern: str) -> set[str]:
    """Every match of the pattern's group in any page."""
    return {found for page in PAGES for found in re.findall(pattern, page.read_text())}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_to_files(page: Path) -> None:
    links = re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_recipes_exist() -> None:
    named = mentions(r"\b(configs/\w+\.yaml)\b")
    assert "configs/quickstart.yaml" in named
    assert not [name for name in named if not (ROOT / name).is_file()]


def test_make_targets_exist() -> None:
    phony = re.search(r"^\.PHONY: (.*)$", (ROOT / "Makefile").read_text(), re.MULTILINE)
    assert phony is not None
    named = mentions(r"(?m)(?:^|`)make ([a-z][a-z-]*)")
    assert "demo" in named
    assert named <= set(phony[1].split())


def test_fields_on_command_lines_exist() -> None:
    from stackwise.config.fields import all_fields

    named = mentions(r"--set ([\w.]+)=")
    assert "training.lr" in named
    assert named - {"section.field"} <= set(all_fields())


def test_command_lines_are_accepted() -> None:
    from stackwise.cli import build_parser

    parsed = 0
    for page in PAGES:
        blocks = "".join(re.findall(r"```bash\n(.*?)```", page.read_text(), re.DOTALL))
        for line in blocks.replace("\\\n", " ").split("\n"):
            if line.startswith("stackwise "):
                arguments = shlex.split(line, comments=True)[1:]
                build_parser().parse_args([part for part in arguments if part != "$SMALL"])
                parsed += 1
    assert parsed > 15


def test_api_reference_is_up_to_date() -> None:
    written = (ROOT / "docs" / "api.md").read_text(encoding="utf-8")
    assert written == api_docs.render(), "run `make docs`"


def test_every_public_function_and_class_is_documented() -> None:
    page = api_docs.render()
    assert "<" not in "".join(re.findall(r"```python\n(.*?)```", page, re.DOTALL)), "an address"
    for entry in re.split(r"^### ", page, flags=re.MULTILINE)[1:]:
        name, _, body = entry.partition("\n")
        prose = re.sub(r"```.*?```", "", body, flags=re.DOTALL).strip()
        assert len(prose) > 10, f"{name} has no docstring"


def sample(a: int, *, scale: float | None = None, name: str = "x") -> dict[str, int]:
    """First line with ``code`` and :func:`~package.sample`.

    Formula:
        a / b

    Args:
        a: how many
            of them.
        scale: factor.

    Returns:
        {"a": a}.
    """
    return {name: a}


def test_docstrings_become_markdown() -> None:
    assert list(api_docs._prose(inspect.getdoc(sample))) == [
        "First line with `code` and `package.sample`.",
        "",
        "Formula:",
        "",
        "    a / b",
        "",
        "**Args**",
        "",
        "- `a`: how many",
        "    of them.",
        "- `scale`: factor.",
        "",
        "**Returns**",
        "",
        '- {"a": a}.',
    ]


def test_signatures_show_types_and_defaults() -> None:
    assert list(api_docs._signature("sample", sample))[1] == (
        'sample(a: int, *, scale: float | None = None, name: str = "x") -> dict[str, int]'
    )
