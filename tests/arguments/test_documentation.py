"""docs/arguments.md says what the tables say."""

from tests.arguments.documentation import PATH, text


def test_the_page_is_up_to_date():
    assert PATH.read_text() == text(), "Run: python -m tests.arguments.documentation"
