"""Plain tables for terminals and files: columns of equal width, never cut off or wrapped."""

from collections.abc import Iterable, Sequence


def columns(rows: Iterable[Sequence[str]], left: int = 1, gap: int = 2) -> list[str]:
    """Align the cells of rows of equal length.

    Args:
        rows: The cells.
        left: The number of first columns that are aligned to the left; the others are to the right.
        gap: Spaces between columns.

    Returns:
        A line for each row.

    Example:
        >>> from halo.columns import columns
        >>> columns([("layer", "score"), ("3", "0.25")])
        ['layer  score', '3       0.25']
    """
    table = [list(row) for row in rows]
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    return [
        (" " * gap)
        .join(row[i].ljust(width) if i < left else row[i].rjust(width) for i, width in enumerate(widths))
        .rstrip()
        for row in table
    ]
