"""Tables on stdout."""

from __future__ import annotations


def print_table(columns, rows, text_columns=1, wrapped=(1,)):
    """Print a table; the first ``text_columns`` are text: aligned left, the ``wrapped`` wrap."""
    from rich import box
    from rich.console import Console
    from rich.table import Table

    table = Table(box=box.SIMPLE, pad_edge=False)
    for i, column in enumerate(columns):
        text = i < text_columns
        wraps = text and i in wrapped
        table.add_column(
            column,
            justify="left" if text else "right",
            no_wrap=not wraps,
            overflow="fold" if wraps else "ellipsis",
        )
    for row in rows:
        table.add_row(*(str(cell) for cell in row))
    console = Console(highlight=False)
    if not console.is_terminal:
        console = Console(highlight=False, width=120)
    console.print(table)


def percent(value):
    return f"{100 * value:.1f} %"


def figure(value, digits):
    return "-" if value is None else f"{value:.{digits}f}"
