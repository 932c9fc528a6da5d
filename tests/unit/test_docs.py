"""The documentation: each page is found from the README, no link leads nowhere, its configuration is good."""

import re
import unicodedata
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Final

import pytest

from gpooler.config.load import load_text

ROOT: Final = Path(__file__).parents[2]
PAGES: Final = (ROOT / "README.md", ROOT / "CHANGELOG.md", *sorted((ROOT / "docs").glob("**/*.md")))
LINK: Final = re.compile(r"!?\[(?:[^\[\]]|\[[^\]]*\])*\]\(([^()\s]+)\)")
FENCE: Final = re.compile(r"(?ms)^```.*?^```")


def links(page: Path) -> Iterator[tuple[Path, str]]:
    """Where the links of a page lead that stay in the project: file and anchor."""
    for target in LINK.findall(FENCE.sub("", page.read_text())):
        if re.match(r"[a-z]+:", target):
            continue
        name, _, anchor = target.partition("#")
        yield (page.parent / name).resolve() if name else page, anchor


@cache
def anchors(page: Path) -> frozenset[str]:
    """As GitHub makes them of headings."""
    found: list[str] = []
    for heading in re.findall(r"(?m)^#+ +(.+?) *$", FENCE.sub("", page.read_text())):
        text = re.sub(r"\[([^\]]*)\]\([^)]*\)", r"\1", heading).lower()
        kept = (c for c in text if c in "-_ " or unicodedata.category(c)[0] in "LN")
        anchor = "".join(kept).replace(" ", "-")
        found.append(anchor if anchor not in found else f"{anchor}-{found.count(anchor)}")
    return frozenset(found)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_link_leads_to_a_file_of_the_project_and_a_heading_in_it(page: Path) -> None:
    missing = []
    for file, anchor in links(page):
        is_there = file.exists() and file.is_relative_to(ROOT)
        if not is_there or (anchor and anchor not in anchors(file)):
            missing.append(f"{file}#{anchor}")
    assert missing == []


def test_every_page_is_found_from_the_readme() -> None:
    seen: set[Path] = set()
    ahead = [ROOT / "README.md"]
    while ahead:
        page = ahead.pop()
        if page not in seen and page.suffix == ".md":
            seen.add(page)
            ahead += [file for file, _ in links(page) if file.exists()]
    assert sorted(set(PAGES) - seen - {ROOT / "CHANGELOG.md"}) == []


def test_every_page_is_in_the_index() -> None:
    index = ROOT / "docs" / "README.md"
    assert sorted({page for page in PAGES if page.parent == index.parent} - {index}) == sorted(
        {file for file, _ in links(index) if file.parent == index.parent}
    )


def test_the_configuration_of_the_readme_is_a_good_one() -> None:
    (text,) = re.findall(r"(?ms)^```toml\n(.*?)^```", (ROOT / "README.md").read_text())
    loaded = load_text(text, {"SHOP_PASSWORD": "x"})
    assert loaded.warnings == ()
    assert [rule.name for rule in loaded.config.rules] == ["shop.default"]
