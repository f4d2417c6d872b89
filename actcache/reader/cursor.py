"""Where a stream is, as small JSON, and what must be the same where it goes on."""

from typing import Any, NamedTuple

from actcache.errors import CursorError

CURSOR_VERSION = 1


class Cursor(NamedTuple):
    """Where the next batch begins: slot `slot` of window `window` of epoch `epoch`."""

    epoch: int
    window: int
    slot: int


def to_state(cursor: Cursor, settings: dict[str, Any]) -> dict[str, Any]:
    """JSON, under 4 KiB."""
    return {"version": CURSOR_VERSION, "settings": settings, **cursor._asdict()}


def from_state(state: dict[str, Any], settings: dict[str, Any]) -> Cursor:
    """The cursor in what `to_state` returned; CursorError names every setting that differs."""
    if state.get("version") != CURSOR_VERSION:
        raise CursorError(
            f"cursor version {state.get('version')!r}; this actcache reads version {CURSOR_VERSION}"
        )
    there = state.get("settings")
    if not set(Cursor._fields) <= set(state) or not isinstance(there, dict):
        raise CursorError(f"not a cursor: it has {sorted(state)}; expected what `state_dict` returned")
    differ = [
        f"{name} is {there.get(name)!r} in the cursor and {settings.get(name)!r} here"
        for name in sorted({*settings, *there})
        if settings.get(name) != there.get(name)
    ]
    if differ:
        hint = (
            " (partial= takes the shards of a cursor)"
            if there.get("shards") != settings.get("shards")
            else ""
        )
        raise CursorError(f"this cursor is of another stream: {'; '.join(differ)}{hint}")
    return Cursor(int(state["epoch"]), int(state["window"]), int(state["slot"]))
