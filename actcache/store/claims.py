"""Which shards living producers are at: a claim is a file in its producer's workspace, and is worth what its lock is.

A claim saves work and decides nothing: commits are exclusive whoever claims what. Where locks do not reach from one machine
to another, a shard may be made twice and is committed once.
"""

from pathlib import Path

from actcache.store.disk import Disk, is_held, workspaces

_PREFIX = "shard."


class Claims:
    """The claims of one producer, and those it finds of others."""

    def __init__(self, disk: Disk) -> None:
        self._disk = disk

    def take(self, shard: int) -> bool:
        """Claim a shard; False where another living producer has claimed it (of two at once the one with the lesser nonce)."""
        if self.holders(shard):
            return False
        self._disk.note(f"{_PREFIX}{shard}")
        rivals = self.holders(shard)
        if rivals and min(rivals) < self._disk.nonce:
            self.release(shard)
            return False
        return True

    def force(self, shard: int) -> None:
        """Claim a shard whoever else has."""
        self._disk.note(f"{_PREFIX}{shard}")

    def release(self, shard: int) -> None:
        """Give a claim up; nothing happens where there is none."""
        self._path(shard).unlink(missing_ok=True)

    def holders(self, shard: int) -> list[str]:
        """Nonces of other living producers that have claimed a shard."""
        others = [w for w in workspaces(self._disk.root) if w.name != self._disk.nonce]
        return [w.name for w in others if (w / f"{_PREFIX}{shard}").exists() and is_held(w)]

    def _path(self, shard: int) -> Path:
        return self._disk.workspace / f"{_PREFIX}{shard}"
