"""Merging ranges into requests, for any ranges."""

from hypothesis import given
from hypothesis import strategies as st

from actcache.store.remote import FREE_GAP_BYTES, merge_ranges

ranges_of = st.lists(st.tuples(st.integers(0, 3000), st.integers(0, 200)), max_size=40)


@given(ranges_of, st.integers(0, 300), st.sampled_from([0.0, 0.03, 0.5]), st.integers(1, 2000))
def test_every_range_is_covered_once_and_little_else(ranges, gap_bytes, waste, request_bytes):
    found = merge_ranges(ranges, gap_bytes=gap_bytes, waste=waste, request_bytes=request_bytes)
    assert sorted(part for request in found for part in request.parts) == list(range(len(ranges)))
    for request in found:
        wanted = set()
        for part in request.parts:
            start, n_bytes = ranges[part]
            assert request.start <= start
            assert start + n_bytes <= request.start + request.n_bytes
            wanted.update(range(start, start + n_bytes))
        free = FREE_GAP_BYTES * (len(request.parts) - 1)
        assert request.n_bytes - len(wanted) <= waste * len(wanted) + free
        assert len(request.parts) == 1 or request.n_bytes <= request_bytes
    assert [request.start for request in found] == sorted(request.start for request in found)
