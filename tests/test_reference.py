"""Promises about the docs: the reference is what the code says, every page can be reached, no link leads nowhere."""

import importlib.util
import re
from enum import StrEnum
from pathlib import Path
from types import ModuleType

import pytest
import trainmaster
from trainmaster.api.errors import ConfigError, ModelError, RunError
from trainmaster.system.rpc.client import EXIT_MASTER_LOST, EXIT_RUN_FAILED

ROOT = Path(__file__).resolve().parents[1]
DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("**/*.md"))
LINK = re.compile(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)")


@pytest.fixture(scope="module")
def maker() -> ModuleType:
    """docs/make_reference.py."""
    spec = importlib.util.spec_from_file_location("make_reference", DOCS / "make_reference.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def prose(page: Path) -> str:
    """Without code, in which brackets are no links and a # begins no heading."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    text = re.sub(r"^ {4}.*$", "", text, flags=re.MULTILINE)
    return re.sub(r"`[^`\n]*`", "", text)


def links(page: Path) -> list[str]:
    return [link for link in LINK.findall(prose(page)) if not re.match(r"[a-z]+:", link)]


def anchors(page: Path) -> set[str]:
    """As GitHub and mkdocs make them of headings."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    headings = re.findall(r"^#+ (.+)$", text, flags=re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


def test_the_reference_is_what_the_code_says_now(maker: ModuleType):
    written, now = (DOCS / "reference.md").read_text(encoding="utf-8"), maker.reference()
    stale = [line for line in now.splitlines() if line not in written.splitlines()]
    assert written == now, "docs/reference.md is out of date: run `make reference`. It lacks for example\n" + "\n".join(
        stale[:3]
    )


def test_the_walk_finds_what_only_fields_lead_to(maker: ModuleType):
    names = [cls.__name__ for cls in maker.found()]
    assert {"SFT", "GRPO", "Deadlines", "Layout", "KLEstimator", "OnFailure"} <= set(names)
    assert names == sorted(names, key=str.lower)


def test_every_class_and_field_of_the_configuration_has_a_docstring(maker: ModuleType):
    silent = []
    for cls in maker.found():
        fields = {name: field.description for name, field in maker.fields_of(cls).items()}
        if issubclass(cls, StrEnum):
            fields = {each.name: maker._member_docstrings(cls).get(each.name) for each in cls}
        silent += [f"{cls.__name__}.{name}" for name, words in fields.items() if not (words or "").strip()]
        silent += [] if maker._docstring(cls) else [cls.__name__]
    assert not silent, f"write a docstring for {', '.join(silent)}"


def test_every_class_of_the_configuration_can_be_imported_from_the_package(maker: ModuleType):
    assert {cls.__name__ for cls in maker.found()} <= set(trainmaster.__all__)


def test_exit_codes_are_those_of_the_code(maker: ModuleType):
    codes = re.findall(r"^\| `(\d+)` \|", maker._exit_codes(), re.MULTILINE)
    of_errors = {RunError.exit_code, ConfigError.exit_code, ModelError.exit_code}
    assert set(map(int, codes)) == {0, *of_errors, EXIT_MASTER_LOST, EXIT_RUN_FAILED}


def test_an_unknown_type_is_refused_by_name(maker: ModuleType):
    with pytest.raises(TypeError, match="no words for the type <class 'complex'>: add them there"):
        maker._words(complex)


@pytest.mark.parametrize("page", [page for page in PAGES if page.name != "index.md"], ids=lambda page: page.name)
def test_every_page_is_in_the_table_of_contents(page: Path):
    assert page.relative_to(DOCS).as_posix() in links(DOCS / "index.md"), f"link {page.name} from docs/index.md"


@pytest.mark.parametrize("page", [*PAGES, ROOT / "README.md"], ids=lambda page: page.name)
def test_every_relative_link_leads_somewhere(page: Path):
    for link in links(page):
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name} links to {link}, which is not there"
        if anchor:
            assert anchor in anchors(target), f"{page.name} links to {link}, but {target.name} has no such heading"
