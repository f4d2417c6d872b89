"""Files that are kept open: no more than a bound, right under any number of threads, and gone when they are told to be."""

import mmap
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from actcache.store.local import LocalFiles, lead


def open_under(folder: Path) -> list[str]:
    """Files below a folder that this process has open."""
    found = [_target(link) for link in Path("/proc/self/fd").iterdir()]
    return [str(file) for file in found if file is not None and folder in file.parents]


def _target(link: Path) -> Path | None:
    try:
        return link.readlink()
    except FileNotFoundError:  # the one that listed them
        return None


@pytest.fixture
def files(tmp_path):
    """100 files, of which 5 may be kept open."""
    for i in range(100):
        (tmp_path / f"f{i}").write_bytes(bytes([i]) * 64)
    return LocalFiles(tmp_path, most_open=5)


def test_no_more_than_the_bound_stay_open(files, tmp_path):
    for i in range(100):
        assert bytes(files.read(f"f{i}", 60, 10)) == bytes([i]) * 4
        files.will_need(f"f{i}", 0, 64)
        assert len(open_under(tmp_path)) <= 5
    files.close()
    assert not open_under(tmp_path)
    assert bytes(files.read("f3", 0, 2)) == b"\3\3"
    assert len(open_under(tmp_path)) == 1


def test_a_file_in_use_outlives_its_eviction(files):
    """Many threads and few places: a read never meets a closed file, nor another one under its number."""
    start = threading.Barrier(8)

    def read(seed: int) -> bool:
        start.wait()
        places = [(seed * 37 + i * 11) % 100 for i in range(400)]
        return all(bytes(files.read(f"f{i}", 0, 64)) == bytes([i]) * 64 for i in places)

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(read, range(8)))


def test_a_missing_file(files):
    with pytest.raises(FileNotFoundError):
        files.read("nothing", 0, 1)
    files.will_need("nothing", 0, 1)


def test_a_good_copy_in_the_place_of_a_bad_one_is_found(files, tmp_path):
    assert bytes(files.read("f7", 0, 1)) == b"\7"
    (tmp_path / "copy").write_bytes(b"good")
    (tmp_path / "copy").rename(tmp_path / "f7")
    assert bytes(files.read("f7", 0, 4)) == b"\7" * 4
    assert bytes(files.read("f7", 0, 4, fresh=True)) == b"good"
    assert bytes(files.read("f7", 0, 4)) == b"good"


def test_none_is_kept_unless_asked_for(files, tmp_path):
    alone = LocalFiles(tmp_path)
    assert bytes(alone.read("f3", 1, 2)) == b"\3\3"
    assert not open_under(tmp_path)


def test_bytes_land_at_a_cache_line_and_not_just_behind_where_they_come_from():
    for start in [*range(200), *range(4000, 4200), 262_148, 10**12 + 7]:
        assert lead(start) % 64 == 0
        assert 0 <= lead(start) < mmap.PAGESIZE
        assert 64 <= (lead(start) - start) % mmap.PAGESIZE < 128
