"""The preview as one web page that needs nothing else: every sample with its mask, every refusal, and their counts."""

from collections import Counter
from collections.abc import Iterator, Sequence
from html import escape
from pathlib import Path

from burnish import html
from burnish.config import Recipe
from burnish.data.packing import Sample
from burnish.data.template import Template
from burnish.data.tokenizer import load_template
from burnish.errors import RecipeError
from burnish.preview import FILTERED, PreviewRow, rows
from burnish.sections import FiltersSpec
from burnish.train.ledger import replace_text
from burnish.train.model import check_model

_SCRIPT = """
const tip=document.getElementById('tip');
document.addEventListener('mousemove',e=>{const t=e.target.closest('pre i,pre b');
 if(!t){tip.style.display='none';return}
 const before=[...t.parentNode.children].slice(0,[...t.parentNode.children].indexOf(t));
 const at=before.reduce((n,c)=>n+c.dataset.id.split(' ').length,0);
 tip.textContent=`token ${at}, id ${t.dataset.id}, ${t.tagName==='B'?'trained':'not trained'}`;
 tip.style.cssText=`display:block;left:${Math.min(e.clientX+12,innerWidth-240)}px;top:${e.clientY+16}px`});
"""
_BARS = 40


def write(recipe: Recipe, limit: int, file: Path) -> None:
    """Writes the preview of the first `limit` rows as one HTML file; raises RecipeError where it cannot be written."""
    check_model(recipe)
    template = load_template(recipe)
    text = page(recipe, template, list(rows(recipe, limit, template)))
    try:
        replace_text(file, text)
    except OSError as error:
        raise RecipeError(f"--html {file}: cannot be written: {error.strerror}") from None


def page(recipe: Recipe, template: Template, previewed: Sequence[PreviewRow]) -> str:
    """The HTML of a preview; text of the data stands in it only escaped."""
    samples = [sample for row in previewed for sample in row.samples]
    codes = Counter(row.refused.code for row in previewed if row.refused)
    tokens, trained = sum(map(len, samples)), sum(int(sample.trained.sum()) for sample in samples)
    facts = {
        "rows": f"{len(previewed):,}",
        "refused": f"{codes.total():,}",
        "samples": f"{len(samples):,}",
        "tokens": f"{tokens:,}",
        "trained": f"{trained:,} ({trained / tokens:.1%})" if tokens else "0",
        "longest": f"{max(map(len, samples), default=0):,} of {recipe.data.max_length:,}",
    }
    subtitle = (
        f"{escape(recipe.model.path)}; trained text is <b>green</b>, the rest <i>grey</i>; point at a token to see its id"
    )
    refused = f"<h2>Refused rows by code</h2>{html.table(codes.most_common())}" if codes else ""
    filters = "" if recipe.data.filters == FiltersSpec() else f"<p class=dim>{escape(FILTERED)}</p>"
    body = (
        f"{html.facts(facts)}{filters}{refused}{_lengths([len(sample) for sample in samples])}<h2>Rows</h2>"
        f"{''.join(_row(row, template) for row in previewed)}"
    )
    return html.document(f"{recipe.name}: what is trained", subtitle, body, _SCRIPT)


def _lengths(lengths: Sequence[int]) -> str:
    """A histogram of sample lengths in equal steps from 0 to the longest."""
    if not lengths:
        return ""
    longest = max(lengths)
    counts = Counter(min(_BARS - 1, length * _BARS // longest) for length in lengths)
    most = max(counts.values())
    bars = "".join(
        f"<div style='height:{100 * counts[bar] / most:.1f}%' title='{counts[bar]} samples of {bar * longest // _BARS} to "
        f"{(bar + 1) * longest // _BARS} tokens'></div>"
        for bar in range(_BARS)
    )
    ends = f"<div class='ends dim'><span>0</span><span>{longest:,} tokens</span></div>"
    return f"<h2>Lengths of samples</h2><div class=bars>{bars}</div>{ends}"


def _row(row: PreviewRow, template: Template) -> str:
    if row.refused:
        turn = "" if row.refused.turn is None else f" at message {row.refused.turn}"
        why = f"<span class=bad>refused: {escape(row.refused.code)}{turn}</span>"
        return f"<details open><summary>{escape(row.row)} {why}</summary><pre>{escape(row.refused.message)}</pre></details>"
    return "".join(
        f"<details><summary>{escape(row.row)} <span class=dim>messages {', '.join(map(str, sample.turns))}; "
        f"{len(sample)} tokens, {sample.trained.mean():.0%} trained</span></summary>"
        f"<pre>{''.join(_tokens(sample, template))}</pre></details>"
        for sample in row.samples
    )


def _tokens(sample: Sample, template: Template) -> Iterator[str]:
    """An element for each token; tokens that only together are a character share one."""
    start = 0
    for end in range(1, len(sample) + 1):
        text = template.decode(sample.input_ids[start:end])
        if "\ufffd" in text and end < len(sample) and sample.trained[end] == sample.trained[start] and end - start < 8:
            continue
        tag = "b" if sample.trained[start] else "i"
        ids = " ".join(map(str, sample.input_ids[start:end]))
        shown = escape(text).replace("\n", "\u21b5\n")
        yield f'<{tag} data-id="{ids}">{shown}</{tag}>'
        start = end
