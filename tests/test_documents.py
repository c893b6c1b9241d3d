"""The documents: Python runs, links lead somewhere, the support matrix is current."""

import doctest
import re
from pathlib import Path

import api_pages
import decoding
import jax
import pytest
import support_matrix

import sadsl as sa

ROOT = Path(__file__).parent.parent
DOCS = ROOT / "docs"
# What a build of the pages leaves in `docs/` is no source.
SOURCES = [*DOCS.glob("*.md"), *(DOCS / "howto").glob("*.md")]
PAGES = sorted([ROOT / "README.md", ROOT / "CONTRIBUTING.md", *SOURCES])
BLOCK = re.compile(r"^```python\n(.*?)^```$", re.MULTILINE | re.DOTALL)
LINK = re.compile(r"\]\(([^)#:]+)\)|\{doc\}`([^`]+)`")
# Paths of sources that the text names.
PATH = re.compile(
    r"`((?:sadsl|lowering|pallas_kernels|tests|benchmarks|docs)/[^`<* ]+)`"
)
WITH_CODE = [path for path in PAGES if BLOCK.search(path.read_text())]
by_name = pytest.mark.parametrize("path", PAGES, ids=lambda path: path.stem)


@pytest.fixture
def as_users_have_it():
    """JAX without the strict rules of the tests."""
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield


@pytest.mark.usefixtures("quick", "as_users_have_it")
@pytest.mark.parametrize("path", WITH_CODE, ids=lambda path: path.stem)
def test_python_in_documents_runs(path):
    """The blocks of a page are one program; what a prompt shows is compared."""
    flags = doctest.NORMALIZE_WHITESPACE | doctest.ELLIPSIS
    names, runner = {}, doctest.DocTestRunner(optionflags=flags)
    for number, code in enumerate(BLOCK.findall(path.read_text())):
        if ">>> " not in code:
            exec(compile(code, f"{path.name}, block {number}", "exec"), names)
            continue
        examples = doctest.DocTestParser().get_examples(code)
        test = doctest.DocTest(examples, names, path.name, str(path), 0, code)
        runner.run(test, clear_globs=False)
        names |= test.globs
    assert runner.summarize(verbose=False).failed == 0


@by_name
def test_links_lead_somewhere(path):
    made = {"index", *(f.stem for f in (ROOT / "notebooks").glob("*.ipynb"))}
    made |= {"catalog"}
    for link, page in LINK.findall(path.read_text()):
        if link:
            assert (path.parent / link).exists(), link
        elif Path(page).parent.name in ("api", "notebooks"):
            assert Path(page).name in made, page
        else:
            assert (path.parent / f"{page}.md").exists(), page


@by_name
def test_files_that_the_text_names_exist(path):
    for name in PATH.findall(path.read_text()):
        if "name" not in name and "_build" not in name:
            assert (ROOT / name).exists(), name


def test_the_support_matrix_is_current():
    assert support_matrix.current(), "run python docs/support_matrix.py"


@pytest.mark.slow
def test_the_page_of_decoding_is_current():
    assert decoding.PAGE.read_text() == decoding.page(), "run python docs/decoding.py"


FEW = "causal", "segments", "linear", "longformer", "moba"


@pytest.mark.slow
@pytest.mark.parametrize("impl", ["reference", "xla", "tpu", "triton"])
def test_the_letters_of_the_support_matrix_are_what_jax_traces(impl):
    said = support_matrix.written()
    seen = 0
    for table in support_matrix.tables():
        for row in table.rows():
            if row.name in FEW:
                seen += 1
                found = support_matrix.accepted(row, impl)
                assert found == said[table.title, row.name, impl], row.name
    assert seen == len(FEW)


def test_every_exported_name_is_on_a_page_of_the_api():
    written = "\n".join(api_pages.pages().values())
    missing = [n for n in sa.__all__ if f":: sadsl.{n}\n" not in written]
    assert missing == []
