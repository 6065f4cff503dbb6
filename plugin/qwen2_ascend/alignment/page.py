"""One HTML page with everything in it: verdict, pictures, tables.

It needs matplotlib, and jinja2, which torch has.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment

from qwen2_ascend.alignment.judge import Between, Judgement
from qwen2_ascend.alignment.picture import curve_png, heat_map_png

TEMPLATE = """<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<title>{{ "Aligned" if j.aligned else "Parted" }}: {{ j.record.precision }}</title>
<style>
body { font: 15px/1.5 system-ui, sans-serif; color: #222; margin: 2rem auto; max-width: 1150px;
       padding: 0 1rem; }
h1 { font-size: 1.3rem; padding: .8rem 1rem; border-radius: 6px; white-space: pre-line;
     font-weight: 600; }
h1.aligned { background: #e3f2e6; } h1.parted { background: #fbe3e4; }
h2 { font-size: 1.1rem; margin-top: 2rem; }
img { max-width: 100%; }
table { border-collapse: collapse; font-size: 13px; font-variant-numeric: tabular-nums; }
th, td { padding: .15rem .7rem; text-align: right; border-bottom: 1px solid #eee; }
th { position: sticky; top: 0; background: #fff; border-bottom: 2px solid #999; }
th:first-child, td:first-child { text-align: left; }
tr.parted td { background: #fbe3e4; font-weight: 600; } tr.layer td { border-top: 2px solid #bbb; }
dt { font-weight: 600; float: left; width: 11rem; } dd { margin-left: 12rem; }
p.note { color: #555; max-width: 52rem; }
</style>
</head>
<body>
<h1 class="{{ 'aligned' if ok else 'parted' }}">{{ verdict }}</h1>
<dl>
<dt>This run</dt><dd>{{ j.record.origin }}</dd>
{% if between %}<dt>Compared with</dt><dd>{{ between.other.record.origin }}</dd>{% endif %}
<dt>Reference</dt><dd>transformers in {{ j.wide }}</dd>
<dt>Tokens</dt><dd>{{ j.record.tokens.shape[0] * j.record.tokens.shape[1] }} sequence(s) of
{{ j.record.tokens.shape[2] - 1 }}</dd>
<dt>Loss</dt><dd>{{ "%.8f" | format(j.record.loss) }}, reference {{ "%.8f" | format(j.loss) }},
noise {{ "%.1e" | format(j.loss_noise) }}</dd>
<dt>Logits</dt><dd>largest difference {{ "%.1e" | format(j.logits.max_abs) }}
({{ "%.1e" | format(j.logits.relative_to_largest) }} of the largest logit), KL divergence
{{ "%.1e" | format(j.logits.kl_mean) }} nats, likeliest token equal at
{{ "%.2f" | format(100 * j.logits.top1) }}%, five likeliest at
{{ "%.2f" | format(100 * j.logits.top5) }}%</dd>
</dl>
<img alt="heat map of layers and sublayers" src="data:image/png;base64,{{ picture }}">
<p class="note">Own error: transformers' sublayer gets this run's input in {{ j.wide }}; the
difference of the two outputs is the sublayer's own error, without those of earlier layers. Noise:
the same error of transformers' sublayer in {{ j.record.precision }}. All are lengths of differences
relative to the reference, token by token. A sublayer differs above {{ j.noise_factor }} times the
noise.</p>
{% if curve %}
<h2>Loss of {{ j.steps | length }} training step(s)</h2>
<img alt="loss curve" src="data:image/png;base64,{{ curve }}">
<table>
<tr><th>step</th><th>loss</th><th>reference</th><th>difference</th><th>noise</th>
<th>gradient norm</th><th>reference</th></tr>
{% for s in j.steps %}
<tr{% if s.parted %} class="parted"{% endif %}><td>{{ s.step }}</td>
<td>{{ "%.7f" | format(s.loss) }}</td><td>{{ "%.7f" | format(s.reference) }}</td>
<td>{{ "%.1e" | format((s.loss - s.reference) | abs) }}</td><td>{{ "%.1e" | format(s.noise) }}</td>
<td>{{ "%.5f" | format(s.grad_norm) }}</td><td>{{ "%.5f" | format(s.reference_grad_norm) }}</td>
</tr>{% endfor %}
</table>
{% endif %}
<h2>Sublayers</h2>
<table>
<tr><th>sublayer</th><th>own error, mean</th><th>worst token</th><th>noise, mean</th>
<th>worst token</th><th>ratio</th><th>whole model</th><th>noise</th>
{% if between %}<th>the two runs</th>{% endif %}</tr>
{% for f in j.findings %}
<tr class="{{ 'parted' if f.parted }}{{ ' layer' if f.name.endswith('.input') }}">
<td>{{ f.place }}</td><td>{{ "%.1e" | format(f.own.mean) }}</td>
<td>{{ "%.1e" | format(f.own.worst) }}</td><td>{{ "%.1e" | format(f.noise.mean) }}</td>
<td>{{ "%.1e" | format(f.noise.worst) }}</td><td>{{ "%.2g" | format(f.ratio) }}</td>
<td>{{ "%.1e" | format(f.total.mean) }}</td><td>{{ "%.1e" | format(f.total_noise.mean) }}</td>
{% if between %}<td>{{ "%.1e" | format(between.activations[f.name].mean) }}</td>{% endif %}
</tr>{% endfor %}
</table>
{% if j.gradients %}
<h2>Gradients</h2>
<p class="note">Gradients of the mean loss. Each has the errors of the forward pass and of the
backward pass down to it.</p>
<table>
<tr><th>parameter</th><th>error</th><th>noise</th><th>ratio</th>
{% if between and between.gradients %}<th>the two runs</th>{% endif %}</tr>
{% for g in j.gradients %}
<tr{% if g.parted %} class="parted"{% endif %}><td>{{ g.name }}</td>
<td>{{ "%.1e" | format(g.error) }}</td><td>{{ "%.1e" | format(g.noise) }}</td>
<td>{{ "%.2g" | format(g.ratio) }}</td>
{% if between and between.gradients %}
<td>{{ "%.1e" | format(between.gradients[g.name]) }}</td>{% endif %}
</tr>{% endfor %}
</table>
{% endif %}
</body>
</html>
"""


def write_pages(
    judgement: Judgement, between: Between | None, verdict: str, files: Mapping[str, Path]
) -> None:
    """Writes the heat map and the page, where `files` has "png" and "html".

    Args:
        judgement: the judgement of this run.
        between: the comparison with another run.
        verdict: the finding in words.
        files: where to write them.
    """
    picture = heat_map_png(judgement)
    if "png" in files:
        files["png"].write_bytes(picture)
    if "html" in files:
        curve = curve_png(judgement) if judgement.steps else None
        page = _render(judgement, between, verdict, picture, curve)
        files["html"].write_text(page, encoding="utf-8")


def _render(
    judgement: Judgement,
    between: Between | None,
    verdict: str,
    picture: bytes,
    curve: bytes | None,
) -> str:
    environment: Any = Environment(autoescape=True, trim_blocks=True)
    return environment.from_string(TEMPLATE).render(
        j=judgement,
        ok=judgement.aligned and (between is None or between.other.aligned),
        between=between,
        verdict=verdict,
        picture=base64.b64encode(picture).decode(),
        curve=None if curve is None else base64.b64encode(curve).decode(),
    )
