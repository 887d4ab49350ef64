"""Web pages that need nothing but themselves: one style, and text of others only escaped."""

from collections.abc import Iterable, Mapping, Sequence
from html import escape

_STYLE = """
:root { color-scheme: light dark; --ink: #1d2433; --dim: #6b7484; --paper: #fff; --line: #e2e6ec;
  --on: #0b7a3b; --onbg: #d9f5e4; --bad: #b3261e }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ef; --dim: #8b95a5; --paper: #14181f; --line: #2b323d;
  --on: #7ce0a3; --onbg: #12391f; --bad: #ff8a80 } }
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper);
  max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.4rem; margin: 0 }
h2 { font-size: 1.05rem; margin: 2rem 0 .5rem }
.dim { color: var(--dim) }
.bad { color: var(--bad) }
dl { display: flex; flex-wrap: wrap; gap: .3rem 2rem; margin: 1rem 0 }
dt { color: var(--dim); font-size: .8rem }
dd { margin: 0; font-size: 1.15rem }
details { border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0; padding: .4rem .8rem }
summary { cursor: pointer; overflow-wrap: anywhere }
pre { white-space: pre-wrap; overflow-wrap: anywhere; font: 13px/1.6 ui-monospace, monospace; margin: .5rem 0 }
i, b { font-style: normal; font-weight: inherit; border-radius: 2px }
i { color: var(--dim) }
b { color: var(--on); background: var(--onbg) }
i:hover, b:hover { outline: 1px solid currentColor }
#tip { position: fixed; background: var(--ink); color: var(--paper); padding: .15rem .5rem; border-radius: 5px;
  font-size: 12px; display: none }
.bars { display: flex; align-items: flex-end; gap: 2px; height: 7rem; border-bottom: 1px solid var(--line) }
.bars div { flex: 1; background: var(--on); min-height: 0 }
.ends { display: flex; justify-content: space-between }
td, th { padding: .1rem 1.5rem .1rem 0; text-align: left; vertical-align: top; font-weight: inherit }
td { overflow-wrap: anywhere }
th { color: var(--dim); white-space: nowrap }
.curves { display: grid; grid-template-columns: repeat(auto-fill, minmax(19rem, 1fr)); gap: 1rem 2rem }
figure { margin: 0 }
figcaption { display: flex; justify-content: space-between }
svg { width: 100%; height: 8rem; border-bottom: 1px solid var(--line); border-left: 1px solid var(--line) }
polyline { fill: none; stroke: var(--on); stroke-width: 1.5; vector-effect: non-scaling-stroke }
circle { fill: var(--on) }
"""
_POINTS = 500
"""Points of a curve at most; more cannot be told apart on a screen."""


def document(title: str, subtitle: str, body: str, script: str = "") -> str:
    """A whole page; `title` is text, `subtitle` and `body` are HTML."""
    end = f"<div id=tip></div><script>{script}</script>" if script else ""
    return (
        "<!doctype html><html lang=en><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        f"<title>{escape(title)}</title><style>{_STYLE}</style><body>"
        f"<h1>{escape(title)}</h1><div class=dim>{subtitle}</div>{body}{end}</body></html>\n"
    )


def facts(named: Mapping[str, str]) -> str:
    """Short texts with their names, side by side."""
    inner = "".join(f"<div><dt>{escape(name)}</dt><dd>{escape(value)}</dd></div>" for name, value in named.items())
    return f"<dl>{inner}</dl>"


def table(rows: Iterable[Sequence[object]]) -> str:
    """A table of texts whose first column names the row."""
    lines = (f"<tr><th>{escape(str(head))}{''.join(f'<td>{escape(str(cell))}' for cell in cells)}" for head, *cells in rows)
    return f"<table>{''.join(lines)}</table>"


def hidden(summary: str, text: str) -> str:
    """A long text behind its summary."""
    return f"<details><summary>{escape(summary)}</summary><pre>{escape(text)}</pre></details>"


def curve(name: str, points: Sequence[tuple[float, float]]) -> str:
    """A curve of (step, value), steps ascending, with its bounds and its last value; of many points a share is drawn."""
    drawn = [*points[:: -(-len(points) // _POINTS)], points[-1]]
    low, high = min(y for _, y in drawn), max(y for _, y in drawn)
    first, width, height = drawn[0][0], drawn[-1][0] - drawn[0][0] or 1.0, high - low or 1.0
    places = [(600 * (x - first) / width, 150 - 140 * (y - low) / height) for x, y in drawn]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    dots = "".join(f"<circle cx={x:.1f} cy={y:.1f} r=3 />" for x, y in places) if len(set(drawn)) < 12 else ""
    bounds = f"<span>{first:g}</span><span>{low:.4g} to {high:.4g}</span><span>{drawn[-1][0]:g}</span>"
    return (
        f"<figure><figcaption><span>{escape(name)}</span><b>{drawn[-1][1]:.4g}</b></figcaption>"
        f"<svg viewBox='-4 0 608 160' preserveAspectRatio=none><title>{low:.4g} to {high:.4g}</title>"
        f"<polyline points='{line}' />{dots}</svg>"
        f"<div class='ends dim'>{bounds}</div></figure>"
    )
