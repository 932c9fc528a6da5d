"""Placeholders of an auth_query: what becomes a parameter, and what is refused."""

import pytest

from gpooler.auth.query_text import compile_query


@pytest.mark.parametrize(
    ("text", "sql", "has_host"),
    [
        ("SELECT a FROM b WHERE c = $1", "SELECT a FROM b WHERE c = $1", False),
        ("SELECT a FROM b WHERE c = %u;", "SELECT a FROM b WHERE c =  $1", False),
        ("SELECT a FROM b WHERE c = '%u'", "SELECT a FROM b WHERE c =  $1", False),
        ("SELECT f(%u,'%h')", "SELECT f( $1 , $2 )", True),
        ("SELECT 'it''s' || $1", "SELECT 'it''s' || $1", False),
        ("SELECT E'\\'' || $1 -- %u", "SELECT E'\\'' || $1 -- %u", False),
        ("SELECT $1 /* '%u */ LIKE 'a%'", "SELECT $1 /* '%u */ LIKE 'a%'", False),
        ("SELECT $1, $$ %x ' $$", "SELECT $1, $$ %x ' $$", False),
        ("SELECT $1, a%users", "SELECT $1, a%users", False),
    ],
)
def test_placeholders_become_parameters(text: str, sql: str, has_host: bool) -> None:
    compiled = compile_query(text)
    assert (compiled.sql, compiled.has_host) == (sql, has_host)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("SELECT a FROM b WHERE c = 'x%u'", "between quotes"),
        ("SELECT a FROM b WHERE c = '%u '", "between quotes"),
        ("SELECT a FROM b WHERE c = '%u''x'", "between quotes"),
        ("SELECT a FROM b WHERE c = E'%u'", "between quotes"),
        ('SELECT a FROM "%u"', "between quotes"),
        ("SELECT $$%u$$", "between quotes"),
        ("SELECT $t$ $$ %u $t$", "between quotes"),
        ("SELECT '%u", "between quotes"),
        ("SELECT $2", "must not hold $2"),
        ("SELECT a FROM b", "must hold $1 or %u"),
        ("SELECT '$1'", "must hold $1 or %u"),
        ("SELECT 1 -- $1", "must hold $1 or %u"),
        ("SELECT %h", "must hold $1 or %u"),
    ],
)
def test_what_could_be_misread_is_refused(text: str, part: str) -> None:
    with pytest.raises(ValueError, match=r".") as caught:
        compile_query(text)
    assert part in str(caught.value)
