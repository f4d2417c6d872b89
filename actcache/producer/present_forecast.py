"""What a dry run found, for people."""

from rich.table import Table

from actcache.producer.forecast import PlanForecast, TextForecast

_UNITS = ("B", "kB", "MB", "GB", "TB")


def forecast_lines(found: PlanForecast) -> list[str]:
    """The shapes, the text and the time, a sentence each."""
    grid = found.grid
    lines = [
        f"{found.n_tokens:,} tokens in {grid.n_sequences:,} sequences of {grid.seq_len}, {grid.n_shards} shards of "
        f"{grid.sequences_per_shard:,} sequences, {grid.n_holdout_shards} held out; chunks of {grid.rows_per_chunk} rows"
    ]
    if found.text is None:
        lines.append(
            "the corpus was not read: whether it has so many tokens is known with --read, or when it is built"
        )
    else:
        lines += _text_lines(found.text)
    if found.seconds is not None:
        lines.append(
            f"{found.n_forward_tokens:,} positions at {found.tokens_per_s:,.0f} tokens/s: {_duration(found.seconds)}"
        )
    lines.append(
        f"on disk about {_size(found.expected_bytes)} ({_size(found.side_bytes)} of it tokens, row numbers, norms and "
        f"statistics); {_size(found.free_bytes)} free"
    )
    return lines


def _text_lines(text: TextForecast) -> list[str]:
    total = max(1, sum(n for _name, n in text.tokens_by_source))
    shares = ", ".join(f"{name} {n:,} ({100 * n / total:.1f} %)" for name, n in text.tokens_by_source)
    cut = f"; {text.n_tokens_cut:,} tokens of long documents are cut off" if text.n_tokens_cut else ""
    lines = [f"{text.n_documents_read:,} documents read; tokens: {shares}{cut}"]
    if text.is_short:
        lines.append("the corpus is shorter than was asked for: --allow-short takes what there is")
    return lines


def forecast_table(found: PlanForecast) -> Table:
    """A line for every capture: its size with every codec, and how well its rows could be shuffled."""
    table = Table(show_edge=False)
    table.add_column("capture", overflow="fold")
    for name in ("layers", "width"):
        table.add_column(name, justify="right")
    for codec in found.captures[0].bytes_by_codec:
        table.add_column(codec, justify="right")
    table.add_column("batch variance", justify="right")
    for capture in found.captures:
        sizes = [
            _size(n) + (" *" if codec == capture.codec else "") for codec, n in capture.bytes_by_codec.items()
        ]
        table.add_row(
            capture.name,
            str(len(capture.layers)),
            f"{capture.width:,}",
            *sizes,
            f"{capture.shuffle.variance_ratio:.2f}x",
        )
    return table


def forecast_notes(found: PlanForecast) -> str:
    """What the columns mean."""
    shuffle = found.captures[0].shuffle
    return (
        f"* the codec asked for; sizes are expectations. Batch variance: of means of {shuffle.batch_rows:,} rows over random "
        f"ones, in windows of {shuffle.n_window_rows:,} rows ({shuffle.n_window_sequences:,.0f} sequences effectively), if two "
        f"rows of a sequence correlate by {shuffle.rho:g}. Nothing was written."
    )


def _size(n: float) -> str:
    for unit in _UNITS[:-1]:
        if n < 1000:
            return f"{n:.0f} {unit}" if unit == "B" else f"{n:.1f} {unit}"
        n /= 1000
    return f"{n:.2f} {_UNITS[-1]}"


def _duration(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    return f"{hours} h {rest // 60:02d} min" if hours else f"{rest // 60} min {rest % 60:02d} s"
