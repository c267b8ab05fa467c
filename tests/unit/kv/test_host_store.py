"""What a rank's blocks hold comes back from its host slots bit by bit, from memory and from a file;
a disk that fails costs what it lost, and says so."""

from __future__ import annotations

import os
import stat
from pathlib import Path

import pytest
import torch

from ds_cp.attention import LayerSpec
from ds_cp.kv.host_store import FileStore, PinnedStore
from ds_cp.kv.pool import KVPool

SPECS = [LayerSpec(4, 2, 16, 0.25), LayerSpec(4, 1, 8, 0.3)]


def pool_of(dtype: torch.dtype, blocks: int = 6) -> KVPool:
    pool = KVPool(SPECS, blocks, 4, dtype, torch.device("cpu"))
    gen = torch.Generator().manual_seed(5)
    content = torch.randn(blocks, pool.block_elements, generator=gen).to(dtype)
    pool.put_blocks(range(blocks), content)
    return pool


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("in_folder", [False, True])
def test_content_comes_back_as_it_was(dtype: torch.dtype, in_folder: bool, tmp_path: Path) -> None:
    pool = pool_of(dtype)
    store = FileStore(pool, 5, str(tmp_path) if in_folder else None)
    before = pool.get_blocks(range(6)).clone()
    store.save([0, 3, 5], [4, 0, 2])
    pool.put_blocks(range(6), torch.zeros_like(before))
    store.load([4, 2, 0], [1, 0, 5])
    after = pool.get_blocks(range(6))
    assert torch.equal(after[[1, 0, 5]], before[[0, 5, 3]])
    assert not after[[2, 3, 4]].any(), "other blocks are as they were"
    assert torch.equal(store.read([0, 4]), before[[3, 0]])
    store.save([1], [0])
    assert torch.equal(store.read([0])[0], before[0])
    store.close()
    store.close()
    assert not list(tmp_path.iterdir())


def test_nobody_else_can_open_the_file(tmp_path: Path) -> None:
    store = FileStore(pool_of(torch.float32), 3, str(tmp_path))
    found = os.fstat(store._fd)
    assert found.st_nlink == 0 and not stat.S_IMODE(found.st_mode) & 0o077
    assert found.st_size == 3 * store._nbytes, "all of it is there, so that no write finds it full"
    assert not os.get_inheritable(store._fd)
    store.close()


def test_what_a_failing_file_lost_is_nan_and_it_says_so_once(
    tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = pool_of(torch.bfloat16)
    before = pool.get_blocks(range(6)).clone()
    store = FileStore(pool, 3, str(tmp_path))
    store.save([3, 4, 5], [0, 1, 2])
    assert store.num_failed == 0
    os.ftruncate(store._fd, store._nbytes)
    store.load([0, 2], [1, 2])
    after = pool.get_blocks(range(6))
    assert torch.equal(after[1], before[3]) and bool(after[2].isnan().all())
    assert bool(store.read([1]).isnan().all())
    fd, store._fd = store._fd, os.open(os.devnull, os.O_RDONLY)
    store.save([0], [0])  # fails, so that what slot 0 held before must not come back
    os.close(store._fd)
    store._fd = fd
    store.load([0], [5])
    assert bool(pool.get_blocks([5]).isnan().all())
    store.save([0], [0])
    assert torch.equal(store.read([0])[0], before[0]), "it works again"
    assert store.num_failed == 3, "slot 2, slot 1, the write; slot 0 was known to be lost"
    store.close()
    said = capfd.readouterr().err.splitlines()
    assert len(said) == 1 and "cannot move block 2 of 3" in said[0] and "host_folder" in said[0]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("at", [0, 1001, -1], ids=["first", "middle", "last"])
def test_a_changed_byte_on_a_disk_is_found(
    dtype: torch.dtype, at: int, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    pool = pool_of(dtype)
    before = pool.get_blocks(range(6)).clone()
    store = FileStore(pool, 3, str(tmp_path))
    store.save([3, 4, 5], [0, 1, 2])
    place = store._nbytes + at % store._nbytes  # in slot 1
    [old] = os.pread(store._fd, 1, place)
    os.pwrite(store._fd, bytes([old ^ 4]), place)
    store.load([0, 1, 2], [0, 1, 2])
    after = pool.get_blocks(range(3))
    assert torch.equal(after[[0, 2]], before[[3, 5]]) and bool(after[1].isnan().all())
    assert store.num_failed == 1 and "not what was written" in capfd.readouterr().err
    store.save([5], [1])
    assert torch.equal(store.read([1])[0], before[5])
    store.close()


@pytest.mark.parametrize("in_folder", [False, True])
def test_a_file_that_is_made_later_is_the_forked_process_own(
    in_folder: bool, tmp_path: Path
) -> None:
    pool = pool_of(torch.float32)
    before = pool.get_blocks(range(6)).clone()
    store = FileStore(pool, 3, str(tmp_path) if in_folder else None, later=True)
    assert store._fd < 0 and store.num_slots == 3
    store.save([3], [1])
    assert store._fd >= 0 and torch.equal(store.read([1])[0], before[3])
    store.close()
    lost = FileStore(pool, 3, str(tmp_path / "none"), later=True)
    lost.save([3], [1])
    assert lost.num_failed == 1 and bool(lost.read([1]).isnan().all())


def test_no_room_and_no_folder_are_known_at_once(tmp_path: Path) -> None:
    with pytest.raises(OSError):
        FileStore(pool_of(torch.float32), 1 << 40, str(tmp_path))
    with pytest.raises(OSError):
        FileStore(pool_of(torch.float32), 1, str(tmp_path / "none"))


@pytest.mark.gpu
def test_pinned_content_comes_back_also_later() -> None:
    """Saved before the pool is overwritten, though the copy may run after; a load for later is
    there once the store has settled."""
    device = torch.device("cuda")
    pool = KVPool(SPECS, 64, 4, torch.bfloat16, device)
    before = torch.randn(64, pool.block_elements, device=device).to(torch.bfloat16)
    pool.put_blocks(range(64), before)
    store = PinnedStore(pool, 64)
    for _ in range(3):
        store.save(range(64), range(63, -1, -1))
        pool.put_blocks(range(64), torch.zeros_like(before))
        store.load(range(63, -1, -1), range(64), later=True)
        store.settle()
        assert torch.equal(pool.get_blocks(range(64)), before)
    assert torch.equal(store.read([63, 0]), before[[0, 63]])
    store.close()
    store.close()
