"""A key is a name without its dots, and can be turned back into the name."""

import os

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cache_builder.formats.keys import KEY_PATTERN, escape_key, unescape_key

# Names as Linux knows them: any bytes, the odd ones as surrogates.
NAMES = st.one_of(
    st.text(min_size=1),
    st.text(alphabet="_-.5F2Ea", min_size=1),
    st.binary(min_size=1).map(os.fsdecode),
)


@given(NAMES)
def test_escaping_is_reversible_and_gives_valid_keys(name):
    key = escape_key(name)
    assert KEY_PATTERN.fullmatch(key)
    assert unescape_key(key) == name


@pytest.mark.parametrize(
    ("name", "key"),
    [
        ("n01443537/goldfish_1-2", "n01443537/goldfish_1-2"),
        ("v1.5/cat", "v1_-2E5/cat"),
        ("a b", "a_-20b"),
        ("a_-b", "a_-5F-b"),
        ("é", "_-C3_-A9"),
    ],
)
def test_plain_names_stay_as_they_are_and_others_are_written_in_hexadecimal(name, key):
    assert escape_key(name) == key
