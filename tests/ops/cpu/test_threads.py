"""How many threads a kernel's call gets."""

from __future__ import annotations

import pytest
from compiled_kernels import using_threads
from hypothesis import given
from hypothesis import strategies as st

from ops.cpu.threads import MACS, VALUES, threads_for


@given(
    work=st.one_of(st.integers(0, 1 << 40), st.floats(0, 1e15)),
    of_a_thread=st.sampled_from([MACS, VALUES, 1, 512]),
    threads=st.integers(1, 256),
)
def test_thread_counts(work, of_a_thread, threads: int) -> None:
    with using_threads(threads):
        count = threads_for(work, of_a_thread)
    assert 1 <= count <= threads
    assert count == 1 or work / count >= of_a_thread
    assert count == threads or work / (count + 1) < of_a_thread


@pytest.mark.parametrize("threads", [1, 2, 64])
def test_no_work_and_plenty(threads: int) -> None:
    with using_threads(threads):
        assert threads_for(0, MACS) == 1
        assert threads_for(1e12, MACS) == threads
