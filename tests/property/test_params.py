"""Parameter sets against plain dictionaries, on random names and values."""

import re

from hypothesis import given, settings
from hypothesis import strategies as st

from gpooler.relay.params import ParameterSet
from gpooler.relay.probe import parameter_counts

NAMES = st.sampled_from(
    [b"a", b"A", b"TimeZone", b"timezone", b"x.y", b"search_path", b"\xc3\xa9.b", b"long" * 20]
)
VALUES = st.one_of(
    st.sampled_from([b"", b"1", b"2"]), st.binary(max_size=8).map(lambda value: value.replace(b"\0", b""))
)
LITERAL = (
    rb"(?:E'(?:[ -&(-\[\]-~]|''|\\\\)*'"
    rb"|pg_catalog\.convert_from\(pg_catalog\.decode\('[0-9a-f]*','hex'\),pg_catalog\.getdatabaseencoding\(\)\))"
)
STATEMENT = (
    rb'(?:SET "[A-Za-z0-9_]+"=%s;|RESET "[A-Za-z0-9_]+";'
    rb"|SELECT pg_catalog\.set_config\(%s,(?:%s|NULL),false\) IS NULL;)" % (LITERAL, LITERAL, LITERAL)
)
CONTENTS = st.dictionaries(NAMES, VALUES, max_size=6)


def folded(content: dict[bytes, bytes]) -> dict[bytes, tuple[bytes, bytes]]:
    """By lower-case name: the spelling and the value that came last."""
    return {name.lower(): (name, value) for name, value in content.items()}


@settings(max_examples=400)
@given(CONTENTS, CONTENTS)
def test_sets_are_equal_when_their_content_is(one: dict[bytes, bytes], other: dict[bytes, bytes]) -> None:
    is_same = folded(one) == folded(other)
    assert (ParameterSet.of(one, False) == ParameterSet.of(other, False)) == is_same
    assert ParameterSet.of(one, False).items() == sorted(
        folded(one).values(), key=lambda item: item[0].lower()
    )


@settings(max_examples=400)
@given(CONTENTS, CONTENTS)
def test_merge_lays_one_over_the_other(base: dict[bytes, bytes], over: dict[bytes, bytes]) -> None:
    before = parameter_counts()
    expected = folded(base)
    for key, (name, value) in folded(over).items():
        expected[key] = (expected[key][0] if key in expected else name, value)
    merged = ParameterSet.of(base, True).merged(ParameterSet.of(over, False))
    assert merged.items() == [expected[key] for key in sorted(expected)]
    del merged
    assert parameter_counts() == before


@settings(max_examples=400)
@given(CONTENTS, CONTENTS)
def test_deploy_names_exactly_what_differs(has: dict[bytes, bytes], wants: dict[bytes, bytes]) -> None:
    text = ParameterSet.of(has, False).deploy(ParameterSet.of(wants, False))
    have, want = folded(has), folded(wants)
    changed = [key for key in want if key not in have or have[key][1] != want[key][1]]
    unwanted = [key for key in have if key not in want]
    assert re.fullmatch(rb"(?:%s)*" % STATEMENT, text)
    assert len(re.findall(STATEMENT, text)) == len(changed) + len(unwanted)
