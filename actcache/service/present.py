"""A look at a store as a table for a terminal."""

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from actcache.service.watch import Look
from actcache.store.live import ConsumerState, ProducerState

_SILENT_S = 20.0


def render(look: Look) -> RenderableType:
    """Everything that is known, top to bottom: the store, producers, consumers, a service, what is the bottleneck."""
    parts: list[RenderableType] = [_store(look)]
    if look.producers:
        parts.append(_producers(look))
    if look.consumers or look.expired:
        parts.append(_consumers(look))
    if look.service is not None:
        parts.append(_service(look.service))
    parts.append(Text(f"bottleneck: {look.bottleneck}", style="bold"))
    return Group(*parts)


def line(look: Look) -> str:
    """The same in a few words, for a log."""
    said = [f"{look.committed:,} of {look.n_shards:,} shards committed"]
    if look.used_bytes is not None:
        of = "" if look.budget is None else f" of {_size(look.budget.max_disk_bytes)}"
        said.append(f"disk {_size(look.used_bytes)}{of}")
    said += [f"{s.name} {s.phase} at shard {s.at_shard:,}, {s.rows:,} rows" for s, _silent in look.consumers]
    return "; ".join([*said, f"bottleneck: {look.bottleneck}"])


def _store(look: Look) -> RenderableType:
    share = look.committed / max(1, look.n_shards)
    lines = [
        Text(look.name, style="bold"),
        Text(
            f"{_bar(share)} {look.committed:,} of {look.n_shards:,} shards committed ({share:.0%} of {look.n_tokens:,} "
            f"tokens)" + (f", {look.retired:,} retired" if look.retired else "")
        ),
    ]
    if look.used_bytes is not None:
        text = f"disk {_size(look.used_bytes)}"
        if look.budget is not None:
            frac = look.used_bytes / look.budget.max_disk_bytes
            text = f"{_bar(frac)} {text} of {_size(look.budget.max_disk_bytes)}"
        lines.append(Text(text))
    return Group(*lines)


def _size(n_bytes: float) -> str:
    return f"{n_bytes / 1e9:,.2f} GB" if n_bytes >= 1e9 else f"{n_bytes / 1e6:,.1f} MB"


def _bar(share: float, width: int = 24) -> str:
    full = round(min(1.0, max(0.0, share)) * width)
    return "█" * full + "░" * (width - full)


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left", show_edge=False, pad_edge=False)
    for i, name in enumerate(columns):
        table.add_column(name, justify="left" if i == 0 else "right", overflow="fold")
    return table


def _producers(look: Look) -> Table:
    table = _table("\nproducers", "who", "state", "shard", "tok/s", "stages")
    for state, silent_s in look.producers:
        table.add_row(
            f"{state.host}:{state.pid}" + (f" rank {state.rank}" if state.world_size > 1 else ""),
            _phase(state, silent_s),
            "-" if state.shard is None else f"{state.shard:,}",
            f"{state.tokens_per_s:,.0f}",
            _stages(state),
        )
        if state.reason:
            table.add_row("", Text(state.reason, style="yellow"))
    return table


def _stages(state: ProducerState) -> str:
    total = sum(state.stage_s.values())
    if not total:
        return "-"
    ordered = sorted(state.stage_s.items(), key=lambda item: -item[1])
    return " ".join(f"{name} {seconds / total:.0%}" for name, seconds in ordered[:3] if seconds)


def _phase(state: ProducerState | ConsumerState, silent_s: float) -> Text:
    if state.phase in ("working", "waiting", "blocked") and silent_s > _SILENT_S:
        return Text(f"silent for {silent_s:.0f} s", style="red")
    style = {"blocked": "yellow", "waiting": "yellow", "failed": "red"}.get(state.phase, "green")
    return Text(state.phase, style=style)


def _consumers(look: Look) -> Table:
    table = _table("\nconsumers", "name", "state", "at shard", "saved", "behind", "rows/s", "waiting", "")
    for state, silent_s in look.consumers:
        facts = "  ".join(
            f"{k} {v:.4g}" if isinstance(v, float) else f"{k} {v}" for k, v in state.facts.items()
        )
        is_given_up = state.name in look.expired
        table.add_row(
            state.name,
            Text("expired", style="red") if is_given_up else _phase(state, silent_s),
            f"{state.at_shard:,}",
            f"{state.needs_shard:,}",
            f"{look.lag(state):,}",
            f"{state.rows_per_s:,.0f}",
            f"{state.waited_frac:.0%}",
            facts,
        )
    here = {state.name for state, _silent in look.consumers}
    for name in look.expired:
        if name not in here:
            table.add_row(name, Text("expired", style="red"))
    if look.budget is not None:
        for name in look.budget.consumers:
            if name not in here and name not in look.expired:
                table.add_row(name, Text("not here yet", style="yellow"))
    return table


def stores_table(location: str, stores: list[dict]) -> Table:
    """The stores of a service."""
    table = _table(location, "store", "model", "tokens", "kept", "hooks and layers")
    for found in stores:
        hooks = "; ".join(f"{name} {', '.join(map(str, layers))}" for name, layers in found["hooks"].items())
        table.add_row(
            found["name"], found["model"], f"{found['tokens']:,}", f"{found['kept_tokens']:,}", hooks
        )
    return table


def _service(status: dict) -> Table:
    table = _table("\nservice", "calls", "rows", "windows", "decoded", "reused", "evicted", "refused", "up")
    table.add_row(
        f"{status['active_calls']:,} under way",
        f"{status['rows']:,}",
        f"{status['windows']} ({status['window_bytes'] / 1e9:.2f} of {status['window_limit_bytes'] / 1e9:.2f} GB)",
        f"{status['windows_decoded']:,}",
        f"{status['windows_reused']:,}",
        f"{status['windows_evicted']:,}",
        f"{status['refused']:,}",
        f"{status['up_s']:,.0f} s",
    )
    return table
