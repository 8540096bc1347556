"""A bar chart of the main figures, as SVG written by hand: no library, and no
scripts in it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from xml.sax.saxutils import escape

from .report import Figures
from .rivals import RIVALS

__all__ = ["svg"]

WIDTH, MARGIN, GAP = 980, 24, 36
LABEL, VALUE = 138, 74
BAR, STEP = 15, 22
HEAD = 84
OURS, LIMIT, OTHER = "#2563a8", "#8a9099", "#c4c9d0"
INK, FAINT = "#1b1f24", "#5b636d"
SHORT = {
    "limit": "limit (C)",
    "hand-over": "hand-over",
    "splice": "splice",
    "socat": "qvm-connect-tcp",
    "accept": "Accept=yes units",
    "proxyd": "socket-proxyd",
    "qrexec-connect": "qrexec-connect",
}


@dataclass(frozen=True)
class _Panel:
    title: str
    note: str
    measure: str
    key: str
    write: Callable[[float], str]
    scale: float = 1.0


LONGER, SHORTER = "longer is better", "shorter is better"
PANELS = (
    _Panel(
        "First byte",
        f"p50, ms; {SHORTER}",
        "first-byte",
        "p50",
        "{:.2f}".format,
        1e-6,
    ),
    _Panel(
        "Connections per second",
        f"16 at once; {LONGER}",
        "connections-16",
        "per_second",
        "{:,.0f}".format,
    ),
    _Panel(
        "Throughput both ways",
        f"MiB/s; {LONGER}",
        "throughput-both",
        "mib_per_second",
        "{:,.0f}".format,
    ),
    _Panel(
        "Throughput from the qube",
        f"MiB/s; {LONGER}",
        "throughput-from",
        "mib_per_second",
        "{:,.0f}".format,
    ),
    _Panel(
        "8 streams from the qube",
        f"MiB/s; {LONGER}",
        "throughput-eight",
        "mib_per_second",
        "{:,.0f}".format,
    ),
    _Panel(
        "CPU to move bytes both ways",
        f"s per GiB; {SHORTER}",
        "throughput-both",
        "cpu_per_gib",
        "{:.2f}".format,
    ),
)


def svg(figures: Figures, machine: dict[str, str]) -> str:
    """Two columns of panels, those that were measured."""
    panels = [panel for panel in PANELS if figures.has(panel.measure)]
    width = (WIDTH - 2 * MARGIN - GAP) / 2
    # Every panel is as high as the highest, so that the columns stand in line.
    height = (
        44
        + STEP
        * max((len(_bars(figures, panel)) for panel in panels), default=0)
        + 22
    )
    rows = (len(panels) + 1) // 2
    total = HEAD + rows * height + 8
    parts = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH}'
        f' {total}" width="{WIDTH}" height="{total}"'
        ' font-family="system-ui, sans-serif" font-size="13" role="img"'
        ' aria-label="What a connection costs">',
        f'<rect width="{WIDTH}" height="{total}" fill="#ffffff"/>',
        _text(
            MARGIN,
            34,
            "What a connection costs between a client and qrexec-client-vm",
            size=18,
            weight="600",
        ),
        _text(
            MARGIN,
            56,
            f"{machine['CPU']}; Linux {machine['kernel'].split()[1]}, systemd"
            f" {machine['systemd']},"
            f" Python {machine['Python']}; {machine['date']}",
            fill=FAINT,
            size=12,
        ),
    ]
    for number, panel in enumerate(panels):
        left = MARGIN + (number % 2) * (width + GAP)
        parts += _panel(
            figures, panel, left, HEAD + (number // 2) * height, width
        )
    return "\n".join([*parts, "</svg>"]) + "\n"


def _bars(figures: Figures, panel: _Panel) -> list[tuple[str, float]]:
    values = [
        (name, figures.median(panel.measure, name, panel.key))
        for name in RIVALS
    ]
    return [
        (name, value * panel.scale)
        for name, value in values
        if value is not None
    ]


def _panel(
    figures: Figures, panel: _Panel, left: float, top: float, width: float
) -> list[str]:
    bars = _bars(figures, panel)
    most = max((value for _, value in bars), default=0) or 1
    room = width - LABEL - VALUE
    parts = [
        _text(left, top + 14, panel.title, weight="600"),
        _text(
            left + width,
            top + 14,
            panel.note,
            fill=FAINT,
            size=12,
            anchor="end",
        ),
    ]
    for number, (name, value) in enumerate(bars):
        y = top + 28 + number * STEP
        ours = name in ("hand-over", "splice")
        color = OURS if ours else LIMIT if name == "limit" else OTHER
        length = max(room * value / most, 1)
        middle = y + BAR - 3
        parts += [
            _text(
                left + LABEL - 10,
                middle,
                SHORT[name],
                anchor="end",
                weight="600" if ours else "400",
            ),
            f'<rect x="{left + LABEL:.1f}" y="{y}" width="{length:.1f}"'
            f' height="{BAR}" rx="2" fill="{color}"/>',
            _text(
                left + LABEL + length + 6,
                middle,
                panel.write(value),
                weight="600" if ours else "400",
            ),
        ]
    base = top + 24 + STEP * len(bars) + 4
    parts.append(
        f'<line x1="{left + LABEL:.1f}" y1="{top + 24}"'
        f' x2="{left + LABEL:.1f}" y2="{base}" stroke="{FAINT}"/>'
    )
    return parts


def _text(
    x: float,
    y: float,
    text: str,
    *,
    size: int = 13,
    fill: str = INK,
    anchor: str = "start",
    weight: str = "400",
) -> str:
    return (
        f'<text x="{x:.1f}" y="{y:.1f}" font-size="{size}" fill="{fill}"'
        f' text-anchor="{anchor}"'
        f' font-weight="{weight}">{escape(text)}</text>'
    )
