"""One self-contained HTML page about an evaluation: no script, no external resource."""

from __future__ import annotations

import base64
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import jinja2

from dvi_jax.evaluate.plots import (
    category_rows,
    plot_accept_lengths,
    plot_positions,
    plot_speed,
    plot_turns,
)
from dvi_jax.evaluate.style import Theme, svg
from dvi_jax.evaluate.trace import Turn

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PAGE = """{% macro picture(name, says) %}<picture>
<source media="(prefers-color-scheme: dark)" srcset="{{ pictures[name].dark }}">
<img alt="{{ says }}" src="{{ pictures[name].light }}"></picture>{% endmacro %}<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>Speculative decoding: {{ settings.questions_file }}</title>
<style>
  :root { color-scheme: light dark; --text: #1c2430; --page: #fff; --faint: #4c5662; --panel: #f3f5f8; --line: #e3e6ea;
          --strong: #c9cfd6; --bad: #8f1d1d; --alarm: #fde8e8 }
  @media (prefers-color-scheme: dark) {
    :root { --text: #e6edf3; --page: #0d1117; --faint: #9aa4b0; --panel: #1a212b; --line: #262d36; --strong: #454e59;
            --bad: #fecaca; --alarm: #5b1b1b }
  }
  body { font: 15px/1.5 system-ui, sans-serif; color: var(--text); background: var(--page); max-width: 1060px;
         margin: 2rem auto; padding: 0 1rem; }
  h1 { font-size: 1.5rem; margin-bottom: .2rem } h2 { font-size: 1.15rem; margin-top: 2.2rem }
  .headline { display: flex; flex-wrap: wrap; gap: .8rem; margin: 1.2rem 0 }
  .headline div { background: var(--panel); border-radius: 8px; padding: .7rem 1.1rem; flex: 1 1 10rem }
  .headline b { display: block; font-size: 1.5rem }
  .bad { background: var(--alarm) !important; color: var(--bad) }
  .wide { overflow-x: auto }
  table { border-collapse: collapse; font-variant-numeric: tabular-nums; font-size: .9rem; width: 100% }
  th, td { padding: .3rem .55rem; border-bottom: 1px solid var(--line); text-align: right; white-space: nowrap }
  th { font-weight: 600; vertical-align: bottom; white-space: normal }
  th:first-child, td:first-child { text-align: left; white-space: normal; overflow-wrap: anywhere; min-width: 9.5rem }
  tr.total td { font-weight: 600; border-top: 2px solid var(--strong) }
  .settings, .narrow { width: auto }
  .settings td + td { text-align: left; overflow-wrap: anywhere; white-space: normal }
  .pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(300px, 100%), 1fr)); gap: 1.2rem }
  figure { margin: 0 } img { max-width: 100%; height: auto } figcaption { font-size: .88rem; color: var(--faint) }
  dt { font-weight: 600 } dd { margin: 0 0 .5rem 1.2rem }
</style>
<h1>Speculative against plain decoding</h1>
<p>{{ overall.questions }} questions, {{ overall.generations }} answers from {{ settings.questions_file }};
drafter {{ settings.drafter }} at exit layer {{ settings.exit_layer }} of {{ settings.num_layers }},
plan {{ settings.plan }}, row class {{ settings.row_class }}, on {{ settings.device }}.</p>
<div class="headline">
  <div><b>{{ overall.speedup_over_fastest | number(2) }}x</b>speed-up over the fastest plain decoding
    ({{ overall.speedup | number(2) }}x over plain of equal width)</div>
  <div><b>{{ overall.tokens_per_round | number(2) }}</b>tokens per round</div>
  <div><b>{{ overall.accept_rate | percent }}</b>of judged drafts accepted</div>
  <div{% if differences %} class="bad"{% endif %}><b>{{ overall.identical_questions }} of {{ overall.questions }}</b>
    questions answered identically</div>
</div>
{% if differences %}<h2>Answers that differ from plain decoding</h2>
<div class="wide"><table class="narrow"><tr><th>question</th><th>turn</th><th>first differing new token</th></tr>
{% for each in differences %}<tr><td>{{ each.question_id }}</td><td>{{ each.turn + 1 }}</td>
<td>{{ each.first_difference }}</td></tr>{% endfor %}</table></div>{% endif %}
<h2>By category</h2>
<div class="wide"><table>
<tr><th>category</th><th>answers</th><th>tokens per round</th><th>accept rate</th>
<th>fastest plain tokens/s</th><th>speculative tokens/s</th><th>speed-up</th><th>median</th>
<th>plain of equal width, tokens/s</th><th>speed-up over it</th><th>with prefill</th>
<th>identical questions</th></tr>
{% for label, row in rows.items() %}<tr{% if loop.last %} class="total"{% endif %}>
<td>{{ label }}</td><td>{{ row.generations }}</td><td>{{ row.tokens_per_round | number(2) }}</td>
<td>{{ row.accept_rate | percent }}</td>
<td>{{ row.fastest_plain.tokens_per_second | number(1) }}</td>
<td>{{ row.speculative.tokens_per_second | number(1) }}</td>
<td>{{ row.speedup_over_fastest | number(2) }}x</td><td>{{ row.median_speedup_over_fastest | number(2) }}x</td>
<td>{{ row.plain.tokens_per_second | number(1) }}</td><td>{{ row.speedup | number(2) }}x</td>
<td>{{ row.speedup_with_prefill | number(2) }}x</td><td>{{ row.identical_questions }} of {{ row.questions }}</td></tr>
{% endfor %}</table></div>
{% if skipped.turns %}<p>Not asked: {% for reason, turns in skipped.reasons.items() %}{{ turns }}
{{ "turn" if turns == 1 else "turns" }} ({{ reason }}){{ "" if loop.last else ", " }}{% endfor %};
{{ skipped.questions_not_asked }} {{ "question" if skipped.questions_not_asked == 1 else "questions" }}
left out entirely.</p>{% endif %}
<h2>Speed</h2>
<div class="pictures">
<figure style="grid-column: 1 / -1">{{ picture("speed", "Tokens per second by category") }}
<figcaption>Tokens per second by category, and their ratio.</figcaption></figure>
<figure>{{ picture("turns", "Speed-up over tokens per round") }}
<figcaption>One dot per answer. Dots below the line were slower than plain decoding.</figcaption></figure>
<figure>{{ picture("accept_lengths", "Accept-length histogram") }}
<figcaption>Accept lengths over all rounds.</figcaption></figure>
<figure>{{ picture("positions", "Accept rate by draft position") }}
<figcaption>Accept rate by draft position.</figcaption></figure>
</div>
<h2>Accept rate by draft position</h2>
<div class="wide"><table><tr><th>category</th>
{% for _ in overall.ctar %}<th>draft {{ loop.index }}</th>{% endfor %}
{% for _ in overall.ctar %}<th>CTAR({{ loop.index }})</th>{% endfor %}</tr>
{% for label, row in rows.items() %}<tr{% if loop.last %} class="total"{% endif %}><td>{{ label }}</td>
{% for rate in row.accept_rate_per_position + row.ctar %}<td>{{ rate | percent }}</td>{% endfor %}
</tr>{% endfor %}</table></div>
<h2>Rounds by accept length</h2>
<div class="wide"><table><tr><th>category</th><th>rounds</th>
{% for _ in overall.accept_length_histogram %}<th>length {{ loop.index }}</th>{% endfor %}</tr>
{% for label, row in rows.items() %}<tr{% if loop.last %} class="total"{% endif %}><td>{{ label }}</td>
<td>{{ "{:,}".format(row.rounds) }}</td>
{% for count in row.accept_length_histogram %}<td>{{ "{:,}".format(count) }}</td>{% endfor %}
</tr>{% endfor %}</table></div>
<h2>Setting</h2>
<div class="wide"><table class="settings">
{% for key, value in settings.items() %}<tr><td>{{ key | replace("_", " ") }}</td><td>{{ value }}</td></tr>
{% endfor %}</table></div>
<h2>How it was measured</h2>
<dl>
<dt>Plain and speculative</dt><dd>Each answer was decoded in every mode one right after the other, at batch 1; their
order alternates. Compilation and first runs are not in the times.</dd>
<dt>Fastest plain, and equal width</dt><dd>On a GPU a row's bits do not depend on how many rows are computed beside it
(row class "any"): plain decoding then computes one row, and both columns are the same runs. Elsewhere plain decoding
of equal bits computes as many rows as the speculative passes, and the fastest plain decoding is measured apart; its
answers were identical in {{ overall.fastest_plain_identical }} of {{ overall.generations }} turns.</dd>
<dt>Tokens per second</dt><dd>Total tokens over total seconds of decoding. The prefill and the one token it yields are
left out, except under 'with prefill', where both count.
'median' is the median speed-up of single answers over the fastest plain decoding.</dd>
<dt>Tokens per round</dt><dd>Mean accept length: accepted drafts plus the verifier's own token.</dd>
<dt>Accept rate</dt><dd>Accepted drafts over judged drafts. Judged are all up to and with a round's first reject; the
column 'draft j' counts the j-th drafts of rounds alone. A token that ends the answer counts as the verifier's own,
never as an accepted draft.</dd>
<dt>CTAR(w)</dt><dd>Of the rounds that drafted at least w tokens, the share whose first w were all accepted.</dd>
<dt>Identical</dt><dd>Speculative decoding and plain decoding of the same row class gave exactly the same token ids in
every turn. A later turn's prompt holds the model's
own earlier answers.</dd>
</dl>
</html>
"""


def render_report(summary: dict[str, Any], turns: Sequence[Turn]) -> str:
    """The page for a summary and the turns it was made from."""
    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined)
    environment.filters |= {"number": _number, "percent": _percent}
    drawings: dict[str, Callable[[], Figure]] = {
        "speed": lambda: plot_speed(summary),
        "turns": lambda: plot_turns(turns),
        "accept_lengths": lambda: plot_accept_lengths(summary),
        "positions": lambda: plot_positions(summary),
    }
    return environment.from_string(PAGE).render(
        **summary,
        rows=category_rows(summary),
        pictures={name: _addresses(draw) for name, draw in drawings.items()},
    )


def _addresses(draw: Callable[[], Figure]) -> dict[Theme, str]:
    """A picture as `data:` URIs, for a light page and for a dark one."""
    themes: tuple[Theme, ...] = ("light", "dark")
    return {name: "data:image/svg+xml;base64," + base64.b64encode(svg(draw, name)).decode() for name in themes}


def _number(value: float | None, digits: int) -> str:
    return "-" if value is None else f"{value:,.{digits}f}"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f}%"
