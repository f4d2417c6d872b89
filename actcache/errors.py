"""Every error actcache raises on purpose.

    ActcacheError
    |-- UsageError            an argument cannot be used                 (also a ValueError)
    |-- NotFoundError         a store, run, model or corpus is not there (also a FileNotFoundError)
    |-- CorpusError           text that cannot be read or is too short   (also a ValueError)
    |-- ModelError            a model whose blocks cannot be captured    (also a ValueError)
    |-- PlanMismatchError     a store or run was made with other arguments (also a ValueError)
    |-- CursorError           a cursor of another stream                 (also a ValueError)
    |-- DamageError           bytes on disk are not what was committed   (also an OSError)
    |-- UncommittedError      rows of a shard that is not committed      (also a LookupError)
    |-- RetiredError          rows that made room for others             (also a LookupError)
    |-- StalledError          nobody goes on writing what is waited for  (also a TimeoutError)
    |-- ExpiredError          a consumer that was given up for lost      (also a LookupError)
    |-- RefusedError          a service that does not let one in         (also a PermissionError)
    |-- DiskFullError         the disk cannot hold what is to be written (also an OSError)
    |-- NonFiniteError        NaN or infinity where numbers are needed   (also an ArithmeticError)
    |-- MemoryBoundError      a memory bound that is too small           (also a MemoryError)
    |-- UnreachableError      storage or a service that does not answer  (also an OSError)
    `-- PeerError             another process of the same run stopped    (also a ConnectionError)

A message says what is wrong with the value in question, where, what was expected, and what to do.
`kind` is stable and append-only: scripts may match on it.
"""

from typing import ClassVar


class ActcacheError(Exception):
    """Base of all errors raised on purpose."""

    kind: ClassVar[str] = "actcache"


class UsageError(ActcacheError, ValueError):
    """An argument cannot be used as given."""

    kind = "usage"


class NotFoundError(ActcacheError, FileNotFoundError):
    """A store, run, model or corpus is not where it was said to be."""

    kind = "not_found"


class CorpusError(ActcacheError, ValueError):
    """The corpus cannot be read, or holds fewer tokens than asked for."""

    kind = "corpus"


class ModelError(ActcacheError, ValueError):
    """The model is of a family, or has a shape, whose blocks cannot be captured."""

    kind = "model"


class PlanMismatchError(ActcacheError, ValueError):
    """What is on disk was made with other arguments; the message names each that differs."""

    kind = "plan_mismatch"


class CursorError(ActcacheError, ValueError):
    """A cursor belongs to another stream; the message names each field that differs."""

    kind = "cursor"


class DamageError(ActcacheError, OSError):
    """An object is missing, empty, truncated, altered or in another's place."""

    kind = "damage"


class UncommittedError(ActcacheError, LookupError):
    """Rows were asked for whose shard is not committed."""

    kind = "uncommitted"


class RetiredError(ActcacheError, LookupError):
    """Rows were asked for that have been deleted, as planned, to stay within a disk budget."""

    kind = "retired"


class StalledError(ActcacheError, TimeoutError):
    """What is waited for has not come, and nobody has been seen working on it; the message says since when."""

    kind = "stalled"


class ExpiredError(ActcacheError, LookupError):
    """A consumer was not heard of for so long that shards are no longer kept for it."""

    kind = "expired"


class RefusedError(ActcacheError, PermissionError):
    """A service refuses: no token or certificate, or not the right one."""

    kind = "refused"


class DiskFullError(ActcacheError, OSError):
    """The disk cannot hold what is to be written."""

    kind = "disk_full"


class NonFiniteError(ActcacheError, ArithmeticError):
    """NaN or infinity among activations, a loss or a gradient."""

    kind = "non_finite"


class MemoryBoundError(ActcacheError, MemoryError):
    """A memory bound is smaller than the order needs; the message states the minimum."""

    kind = "memory_bound"


class UnreachableError(ActcacheError, OSError):
    """Object storage or a service did not answer in time or kept failing; the message says how often it was asked."""

    kind = "unreachable"


class PeerError(ActcacheError, ConnectionError):
    """Another process of the same run stopped, so this one cannot go on."""

    kind = "peer"
