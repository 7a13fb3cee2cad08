"""Style sheet and Jinja2 template of report.html; `page.py` gives the values."""

CSS = """
:root { color-scheme: light; }
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 62rem; padding: 1rem; color: #111; background: #fff;
  font: 1rem/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.6rem; line-height: 1.2; margin: 0.5rem 0; overflow-wrap: anywhere; }
h2 { font-size: 1.2rem; margin: 2.5rem 0 0.75rem; border-bottom: 1px solid #999; }
h3 { font-size: 1rem; margin: 0; }
p, li { max-width: 44rem; overflow-wrap: anywhere; }
a { color: #14375e; }
code, pre { font: 0.875rem/1.5 ui-monospace, SFMono-Regular, Menlo, Consolas, "DejaVu Sans Mono", monospace; }
pre { padding: 0.75rem; border: 1px solid #999; overflow-x: auto; }
.numbers { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 10rem), 1fr)); gap: 0.75rem;
  margin: 1.5rem 0; }
.numbers > div { border: 1px solid #999; border-top: 3px solid #14375e; padding: 0.5rem 0.75rem; }
.numbers dt { font-size: 0.875rem; color: #444; overflow-wrap: anywhere; }
.numbers dd { margin: 0; font-size: 0.875rem; color: #444; }
.numbers dd.value { font-size: 1.35rem; font-weight: 600; line-height: 1.3; color: #111; }
.plots { columns: 2 21rem; column-gap: 2rem; }
figure { margin: 0 0 2rem; max-width: 30rem; break-inside: avoid; }
figure svg { display: block; width: 100%; height: auto; }
figure svg * { stroke-linejoin: round; stroke-linecap: butt; }
figcaption { font-size: 0.875rem; color: #444; }
.legend { font-size: 0.875rem; color: #444; margin: 1rem 0 0.5rem; }
.scroll { overflow-x: auto; margin-bottom: 1.5rem; }
table { border-collapse: collapse; font-size: 0.875rem; font-variant-numeric: tabular-nums; }
th, td { padding: 0.25rem 0.5rem; border-bottom: 1px solid #ccc; text-align: right; white-space: nowrap; }
thead th { border-bottom: 1px solid #111; vertical-align: bottom; }
tbody th, thead tr:first-child th:first-child { text-align: left; padding-left: 0; }
th[colspan] { text-align: center; }
tbody th { font-weight: 400; }
.named tbody th { white-space: normal; min-width: 7rem; }
.facts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); gap: 0 2rem; }
.facts table { width: 100%; }
.facts th, .facts td { white-space: normal; overflow-wrap: anywhere; text-align: left; vertical-align: top; }
.facts tbody th { width: 45%; overflow-wrap: normal; }
footer { margin-top: 3rem; border-top: 1px solid #999; font-size: 0.875rem; color: #444; }
@media print {
  body { max-width: none; padding: 0; font-size: 10pt; }
  h2, h3, figcaption { break-after: avoid; }
  .scroll, pre { overflow: visible; }
  pre { white-space: pre-wrap; }
  thead { display: table-header-group; }
  tr { break-inside: avoid; }
}
"""

TEMPLATE = """
{%- macro body(rows) %}
<tbody>
{%- for row in rows %}
<tr><th scope="row">{{ row[0] }}</th>{% for cell in row[1:] %}<td>{{ cell }}</td>{% endfor %}</tr>
{%- endfor %}
</tbody>
{%- endmacro -%}
{%- macro table(legend, head, rows) %}
<p class="legend">{{ legend }}</p>
<div class="scroll" role="region" aria-label="{{ legend }}" tabindex="0">
<table class="named">
{%- if head %}
<thead><tr>{% for cell in head %}<th scope="col">{{ cell }}</th>{% endfor %}</tr></thead>
{%- endif %}
{{- body(rows) }}
</table>
</div>
{%- endmacro -%}
<!DOCTYPE html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta name="generator" content="llm_snp">
<title>{{ name }}: report of the pruning</title>
<style>{{ css }}</style>
</head>
<body>
<header>
<h1>{{ name }}</h1>
<p>{% if on_hub %}<a href="https://huggingface.co/{{ report.model.name | urlencode }}">{{ report.model.name }}</a>
{%- else %}{{ report.model.name }}{% endif %} with {{ percent(report.sparsity.achieved) }} of its decoder blocks’ linear
parameters removed in one shot ({{ percent(report.sparsity.asked) }} asked), by llm_snp {{ report.versions.llm_snp }}.
{{ after_pruning }}</p>
</header>
<main>
<dl class="numbers">
{%- for label, value, remark in numbers %}
<div><dt>{{ label }}</dt><dd class="value">{{ value }}</dd><dd>{{ remark }}</dd></div>
{%- endfor %}
</dl>
{%- if report.notes %}
<section>
<h2>Notes</h2>
<ul>
{%- for note in report.notes %}
<li>{{ note }}</li>
{%- endfor %}
</ul>
</section>
{%- endif %}
<section>
<h2>Plots</h2>
<div class="plots">
{%- for title, caption, svg in plots %}
<figure>
<h3>{{ title }}</h3>
{{ svg }}
<figcaption>{{ caption }}</figcaption>
</figure>
{%- endfor %}
</div>
</section>
<section>
<h2>Quality</h2>
{%- if perplexity %}
{{- table("Perplexity: consecutive non-overlapping windows, mean over all predicted tokens; less is better",
  ("text", before, "pruned", "change", "predicted tokens", "windows", "tokens per window"), perplexity) }}
{%- else %}
<p>Perplexity was not measured.</p>
{%- endif %}
{%- if tasks %}
{{- table("Tasks of the lm-evaluation-harness, ± one standard error",
  ("task, metric", before, "pruned", "change", "samples", "examples shown", "version"), tasks) }}
{%- endif %}
</section>
{%- if healing %}
<section>
<h2>Healing</h2>
{%- for command, sentence, rows in healing %}
<pre>{{ command }}</pre>
<p>{{ sentence }}</p>
{{- table("Perplexity", ("text", "teacher", "before", "after"), rows) }}
{%- endfor %}
</section>
{%- endif %}
{%- if report.speed is defined %}
<section>
<h2>Speed</h2>
{{- table("Batch of %d, %d prompt tokens, %d new ones, %d runs; %s" | format(report.speed.batch, report.speed.prompt,
  report.speed.new, report.speed.runs, on_device(report.speed.device)), ("", before, "pruned", "change"), speed) }}
{%- for note in report.speed.notes %}
<p>{{ note }}</p>
{%- endfor %}
</section>
{%- endif %}
<section>
<h2>Blocks</h2>
<p>The plan: {{ report.plan.why }}.</p>
<p>Blocks are numbered as before pruning. Error: share of the output energy that is lost after the repair; damping:
ridge of the repair, as a share of the mean variance.</p>
<div class="scroll" role="region" aria-label="What is left of each block" tabindex="0">
<table>
<thead>
<tr><th scope="col" rowspan="2">block</th>{% for site in sites %}<th scope="colgroup" colspan="3">{{ site }}</th>
{%- endfor %}</tr>
<tr>{% for site in sites %}<th scope="col">kept</th><th scope="col">error</th><th scope="col">damping</th>
{%- endfor %}</tr>
</thead>
{{- body(blocks) }}
</table>
</div>
</section>
{%- if steps %}
<section>
<h2>Steps</h2>
{{- table("Linear CKA of the hidden states with those before each step", steps_head, steps) }}
<p>{{ steps_sentences }}</p>
</section>
{%- endif %}
<section>
<h2>How it was made</h2>
<pre>{{ report.command }}</pre>
<div class="facts">
{%- for legend, rows in facts %}
<div>
{{- table(legend, (), rows) }}
</div>
{%- endfor %}
</div>
</section>
</main>
<footer>
<p>The method is that of <a href="https://arxiv.org/abs/2405.17506">Subspace Node Pruning</a> and, where the options say
so, the extensions of llm_snp. All numbers are in report.json.</p>
</footer>
</body>
</html>
"""
