"""The documentation names only what exists: config keys, commands, files, sections."""

import re
from pathlib import Path

import pytest
from conftest import ROOT

from jax_resnet.__main__ import COMMANDS
from jax_resnet.config import default
from jax_resnet.config.keys import leaves

GUIDES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
PAGES = [*GUIDES, ROOT / "CHANGELOG.md"]  # which names what is no more, too
KEYS = [key for key, _ in leaves(default())]
GROUPS = {key[:i] for key in KEYS for i, char in enumerate(key) if char == "."}
# Old and mistyped keys, which the pages show as such.
WRONG_KEYS = {"modle.depth"}
PACKAGES = {"jax"}  # after jax-resnet in `pip uninstall jax-resnet jax-resnet-training`
FENCE = re.compile(r"^```.*?^```$", re.S | re.M)


def anchors(page: Path) -> set[str]:
    """Return the anchors of a page's headings, as GitHub and mkdocs make them of plain words."""
    headings = re.findall(r"^#+ (.*)$", FENCE.sub("", page.read_text()), re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).strip().replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_keys_exist(page: Path) -> None:
    named = re.findall(r"--config\.([a-z]\w*(?:\.\w+)*)", page.read_text())
    assert {key for key in named if key not in KEYS} - WRONG_KEYS == set()


@pytest.mark.parametrize("page", GUIDES, ids=lambda page: page.name)
def test_keys_in_code_exist(page: Path) -> None:
    """`optimizer.name` and `config.data.image.` in code, where the first word is a group of keys."""
    code = re.findall(r"`(?:config\.)?([a-z]\w*)\.(\w[\w.]*?)\.?(?:=[^`]*)?`", FENCE.sub("", page.read_text()))
    # `model` is also a variable, and `data.json` a file.
    named = {f"{group}.{rest}" for group, rest in code if group in GROUPS - {"model"} and rest != "json"}
    assert named - set(KEYS) - GROUPS == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    named = set(re.findall(r"\bjax-resnet ([a-z]\w*)", page.read_text()))
    assert named - COMMANDS.keys() - PACKAGES == set()


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_point_to_files_and_sections(page: Path) -> None:
    for link in re.findall(r"\]\(([^)]+)\)", FENCE.sub("", page.read_text())):
        if "://" in link:
            continue
        name, _, anchor = link.partition("#")
        target = (page.parent / name).resolve() if name else page
        assert target.exists(), link
        assert not anchor or anchor in anchors(target), link


def test_every_command_is_in_the_readme() -> None:
    text = (ROOT / "README.md").read_text()
    assert [name for name in COMMANDS if f"`jax-resnet {name}`" not in text] == []


def test_the_readme_is_short() -> None:
    assert len((ROOT / "README.md").read_text().splitlines()) <= 200
