"""What a page of the documentation defines."""

import doctest
from pathlib import Path

DOCS = Path(__file__).parent.parent / "docs"


def run_page(path):
    """Run the examples of a page; return the names that they define and how many failed."""
    text = (DOCS / path).read_text(encoding="utf-8")
    test = doctest.DocTestParser().get_doctest(text, {}, path, str(DOCS / path), 0)
    failed = doctest.DocTestRunner().run(test, clear_globs=False).failed
    return test.globs, failed
