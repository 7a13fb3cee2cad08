"""The figures of `speed.measure_speed` as lines for a person."""

from __future__ import annotations

from typing import Any

# Label, key, factor to the unit shown, format.
SPEEDS = (
    ("prefill, ms", "prefill_seconds", 1e3, "{:,.2f}"),
    ("decode, ms per token", "decode_seconds_per_token", 1e3, "{:,.3f}"),
    ("decode, tokens/s", "tokens_per_second", 1.0, "{:,.1f}"),
)
SIZES = (
    ("KV cache, MB", "kv_cache_bytes", 1e-6, "{:,.2f}"),
    ("weights, MB", "weight_bytes", 1e-6, "{:,.1f}"),
    ("peak on device, MB", "peak_bytes", 1e-6, "{:,.1f}"),
)


def speed_table(speed: dict[str, Any]) -> list[str]:
    """A table (dense, pruned, how they compare), the spread, what was measured on, and the notes."""
    names = [name for name in ("dense", "pruned") if name in speed]
    rows = [["", *names, *(["pruned is"] if len(names) > 1 else [])]]
    for label, key, factor, style in (*SPEEDS, *SIZES):
        values = [speed[name][key] for name in names]
        if None in values:  # memory that the device does not count
            continue
        row = [label, *(style.format(value * factor) for value in values)]
        if len(names) > 1:
            row.append(_compared(key, *values))
        rows.append(row)
    columns = range(1, len(rows[0]))
    first = max(len(row[0]) for row in rows)
    wide = {i: max(len(row[i]) for row in rows) for i in columns}
    lines = ["  ".join([row[0].ljust(first), *(row[i].rjust(wide[i]) for i in columns)]) for row in rows]
    device = speed["device"]
    threads = f", {_count(device['threads'], 'thread')}" if device["type"] == "cpu" else ""
    return [
        *lines,
        "",
        *(f"spread   {name}: {_spread(speed[name])}" for name in names),
        f"device   {device['name']}, {device['dtype']}{threads}",
        f"runs     {speed['runs']} of each{' in turn' if len(names) > 1 else ''}, batch {speed['batch']}, "
        f"{_count(speed['prompt'], 'prompt token')}, {speed['new']} new",
        *(f"note     {note}" for note in speed["notes"]),
    ]


def _compared(key: str, dense: float, pruned: float) -> str:
    if key.endswith("bytes"):
        return f"{pruned / dense:.2f}x the size"
    return f"{pruned / dense if key == 'tokens_per_second' else dense / pruned:.2f}x as fast"


def _spread(figures: dict[str, Any]) -> str:
    prefill, decode = ([1e3 * value for value in figures[f"{phase}_range"]] for phase in ("prefill", "decode"))
    return (
        f"prefill {prefill[0]:,.2f} to {prefill[1]:,.2f} ms, decode {decode[0]:,.3f} to {decode[1]:,.3f} ms per token"
    )


def _count(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
