"""What was found out about a store, as tables for people."""

from rich.table import Table

from actcache.store.codec_sample import CodecReport


def codec_table(report: CodecReport, title: str) -> Table:
    """Ratio, speeds and error of every codec, the recommended one marked."""
    table = Table(show_edge=False, title=title, title_justify="left")
    for name in ("codec", "ratio", "encode", "decode", "FVU", "worst dimension"):
        table.add_column(name, justify="left" if name == "codec" else "right")
    for name, found in report.codecs.items():
        errors = list((found.error or {}).values())
        fvu, worst = (
            f"{max(getattr(e, n) for e in errors):.1e}" if errors else "0" for n in ("fvu", "worst")
        )
        mark = " *" if name == report.recommended else ""
        speeds = (f"{speed / 1e9:.2f} GB/s" for speed in (found.encode, found.decode))
        table.add_row(name + mark, f"{found.ratio:.2f}x", *speeds, fvu, worst)
    return table
