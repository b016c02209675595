"""Quantities in words: 18209728 bytes are "18.2 MB"."""


def size(count: float) -> str:
    """Bytes for people: 18.2 MB."""
    left = float(count)
    for unit in ("B", "kB", "MB", "GB"):
        if left < 1000:
            return f"{left:.1f} {unit}" if unit != "B" else f"{left:.0f} B"
        left /= 1000
    return f"{left:.1f} TB"
