from __future__ import annotations

import zlib

import crc32c
import pytest
from hypothesis import given
from hypothesis import strategies as st

from ucp.run.crc import combine, crc

ORACLE = {"crc32": zlib.crc32, "crc32c": crc32c.crc32c}


@pytest.mark.parametrize("algorithm", ORACLE)
@given(first=st.binary(max_size=300), second=st.binary(max_size=3000))
def test_crc_of_a_concatenation_from_its_parts(algorithm, first, second):
    oracle = ORACLE[algorithm]
    assert crc(algorithm, second, crc(algorithm, first)) == oracle(first + second)
    assert combine(algorithm, oracle(first), oracle(second), len(second)) == oracle(first + second)


@pytest.mark.parametrize("algorithm", ORACLE)
def test_long_zero_runs(algorithm):
    zeros = bytes(5_000_001)
    assert combine(algorithm, crc(algorithm, b"x"), crc(algorithm, zeros), len(zeros)) == ORACLE[algorithm](
        b"x" + zeros
    )
