"""The style of pages: light and dark, on a phone, on paper.

Owns the style sheet alone. Colours are variables; text has a contrast of 4.5 to 1 at least in both schemes, marks of
3 to 1.
"""

STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1b222c; --soft: #56606d; --line: #dce1e7; --fill: #f3f5f8;
  --own: #e9f1fb; --good: #14694a; --bad: #b0281f; --link: #1d5aa8; --bar: #3b6fb5; --first: #c2560a;
  --second: #8a3fa0; --positive: #1b6ca8; --hard: #c2560a; --easy: #767d88; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171b; --ink: #e4e8ec; --soft: #a2abb6; --line: #353c45;
  --fill: #1e2329; --own: #1c2c40; --good: #62c99b; --bad: #f2938a; --link: #8db8f2; --bar: #5788c9;
  --first: #f2a25c; --second: #cf9bf0; --positive: #6cb4ee; --hard: #f2a25c; --easy: #a2abb6; } }
@media print { :root { color-scheme: light; --paper: #fff; --ink: #000; --soft: #333; --line: #bbb; --fill: #f3f5f8;
  --own: #e9f1fb; --good: #0d4f37; --bad: #8f1f18; --link: #000; --bar: #3b6fb5; --first: #c2560a;
  --second: #8a3fa0; --positive: #1b6ca8; --hard: #c2560a; --easy: #767d88; } }
* { box-sizing: border-box; }
html { scroll-padding-top: .5rem; -webkit-text-size-adjust: 100%; text-size-adjust: 100%; }
body { margin: 0; color: var(--ink); background: var(--paper);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 1.75rem 1rem 4rem; }
h1, h2, h3, h4 { line-height: 1.25; overflow-wrap: anywhere; }
h1 { font-size: 1.6rem; margin: 0 0 .25rem; } h2 { font-size: 1.3rem; margin: 2.75rem 0 .5rem; }
h3 { font-size: 1.08rem; margin: 2rem 0 .5rem; } h4 { font-size: .95rem; margin: 1.25rem 0 .4rem; }
.chapter > h2 { border-top: 1px solid var(--line); padding-top: 1rem; }
p { margin: .4rem 0; overflow-wrap: anywhere; }
a { color: var(--link); }
:focus-visible { outline: 2px solid var(--link); outline-offset: 2px; border-radius: 2px; }
.soft { color: var(--soft); } .small { font-size: .86rem; }
.good { color: var(--good); } .bad { color: var(--bad); }
nav ul { list-style: none; margin: .75rem 0; padding: 0; }
nav li { margin: .15rem 0; } nav a { margin-right: .9rem; } nav b { margin-right: .9rem; font-weight: 600; }
.tiles { display: grid; grid-template-columns: repeat(auto-fill, minmax(9.5rem, 1fr)); gap: .6rem; margin: .75rem 0; }
.tile { border: 1px solid var(--line); border-radius: 8px; padding: .5rem .8rem; min-width: 0; overflow-wrap: anywhere; }
.tile b { display: block; font-size: 1.45rem; line-height: 1.3; font-variant-numeric: tabular-nums; }
.tile .small { display: block; font-variant-numeric: tabular-nums; }
.whole { white-space: nowrap; }
.scroll { overflow-x: auto; margin: .5rem 0; max-width: 100%; }
table { border-collapse: separate; border-spacing: 0; font-variant-numeric: tabular-nums; }
th, td { padding: .22rem .65rem; text-align: right; border-bottom: 1px solid var(--line); white-space: nowrap; }
th { color: var(--soft); font-weight: 600; vertical-align: bottom; }
tbody th { color: inherit; font-weight: 400; }
tbody th, td { vertical-align: baseline; }
th:first-child { text-align: left; position: sticky; left: 0; background: var(--paper); padding-left: 0;
  max-width: 17rem; overflow-wrap: break-word; }
th.long { min-width: 12rem; white-space: normal; }
.left { text-align: left; white-space: normal; }
tr.own > * { font-weight: 700; background: var(--own); }
svg { display: block; max-width: 100%; height: auto; }
.sheet { background: #fff; border-radius: 6px; }
.chart text { font: 12px system-ui, -apple-system, "Segoe UI", Roboto, sans-serif; fill: var(--ink);
  font-variant-numeric: tabular-nums; }
.chart .grid { stroke: var(--line); } .chart .axis { stroke: var(--soft); } .chart .soft { fill: var(--soft); }
.charts { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(100%, 300px), 400px)); gap: .5rem 1.5rem; }
figure { margin: .5rem 0; } figcaption { margin-bottom: .3rem; overflow-wrap: anywhere; }
.positive-line, .line0 { stroke: var(--positive); } .hard-line, .line1 { stroke: var(--hard); }
.easy-line { stroke: var(--easy); } .line2 { stroke: var(--second); } .line3 { stroke: var(--good); }
.positive-fill, .mark0 { fill: var(--positive); } .hard-fill, .mark1 { fill: var(--hard); }
.easy-fill { fill: var(--easy); } .mark2 { fill: var(--second); } .mark3 { fill: var(--good); }
.legend { display: flex; flex-wrap: wrap; gap: .1rem 1.1rem; font-size: .86rem; color: var(--soft); margin: .4rem 0;
  padding: 0; list-style: none; }
.legend li { display: flex; align-items: center; gap: .4rem; overflow-wrap: anywhere; } .legend svg { flex: none; }
details { border: 1px solid var(--line); border-radius: 8px; margin: .5rem 0; padding: .5rem .8rem; }
summary { cursor: pointer; list-style-position: outside; margin-left: 1rem; font-weight: 600; overflow-wrap: anywhere; } summary span { font-weight: 400; }
.example { display: grid; grid-template-columns: 215px minmax(0, 1fr); gap: .9rem; padding: .8rem 0;
  border-top: 1px solid var(--line); }
.cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(min(128px, 100%), 1fr)); gap: .5rem;
  align-items: start; align-content: start; margin: 0; padding: 0; list-style: none; }
.card { border: 2px solid var(--line); border-radius: 8px; padding: .4rem; font-size: .82rem; line-height: 1.35;
  overflow-wrap: anywhere; white-space: pre-line; min-width: 0; }
.card img { display: block; max-width: 100%; height: auto; max-height: 256px; object-fit: contain; margin: 0 auto .3rem; }
.card img.tiny { image-rendering: pixelated; }
.frames { display: grid; gap: 2px; }
.query .card { background: var(--fill); }
.positive { border-color: var(--good); } .chosen { border-color: var(--bad); border-style: dashed; }
.score { display: block; margin-top: .15rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.score.good { color: var(--good); font-weight: 600; } .score.bad { color: var(--bad); font-weight: 600; }
.bars { --values: 1; }
.bar { display: grid; grid-template-columns: 12.5rem minmax(0, 1fr) repeat(var(--values), 4.4rem);
  column-gap: .5rem; align-items: center; margin: .28rem 0; font-size: .86rem; }
.bar h4 { margin: .8rem 0 .1rem; grid-column: 1 / 3; font-size: .95rem; } .bar.head { align-items: end; }
.value { text-align: right; font-variant-numeric: tabular-nums; overflow-wrap: anywhere; line-height: 1.2; }
.value.own, .mean { font-weight: 700; }
.label { text-align: right; overflow-wrap: anywhere; line-height: 1.2; }
.track { position: relative; height: 1.05rem; border-right: 1px solid var(--line);
  background: repeating-linear-gradient(to right, var(--line) 0 1px, var(--fill) 1px 20%); }
.track i { position: absolute; left: 0; top: .12rem; bottom: .12rem; border-radius: 0 2px 2px 0; background: var(--bar); }
.track b { position: absolute; top: -.1rem; bottom: -.1rem; width: 2px; margin-left: -1px; background: var(--ink);
  box-shadow: 0 0 0 1px var(--paper); }
.track b.first { width: 3px; background: var(--first); } .track b.second { width: 3px; background: var(--second);
  top: 45%; }
.track b.base0, .track b.base1 { width: .62rem; height: .62rem; margin: -.31rem 0 0 -.31rem; top: 50%; bottom: auto;
  border-radius: 50%; background: var(--paper); border: 2px solid var(--ink); }
.track b.base1 { border-radius: 0; transform: rotate(45deg) scale(.8); }
.bar > .axis { position: relative; height: 1.2rem; font-size: .8rem; color: var(--soft); }
.axis span { position: absolute; transform: translateX(-50%); }
.print-only { display: none; }
@media screen and (max-width: 720px) {
  .example { grid-template-columns: minmax(0, 1fr); gap: .6rem; }
  .frames { grid-template-columns: repeat(3, 1fr); }
  .bar { grid-template-columns: minmax(0, 1fr) repeat(var(--values), 3.6rem); column-gap: .4rem; row-gap: .1rem;
    margin: .45rem 0; }
  .bar h4 { grid-column: 1; } .label { text-align: left; }
  .track, .bar > .axis { grid-row: 2; grid-column: 1 / -1; }
  .many .bar { grid-template-columns: repeat(var(--values), minmax(0, 1fr)); }
  .many .bar h4, .many .label { grid-column: 1 / -1; }
  .many .track, .many .bar > .axis { grid-row: 3; }
  .tiles { grid-template-columns: repeat(2, minmax(0, 1fr)); }
  th:first-child, th.long { max-width: 9rem; min-width: 5rem; white-space: normal; }
  details { padding: .5rem .6rem; }
}
@media print {
  body { font-size: 10pt; } main { max-width: none; padding: 0; } nav { display: none; }
  * { print-color-adjust: exact; -webkit-print-color-adjust: exact; }
  details:not([open]) { display: none; } .print-only { display: block; }
  .example, .card, .tile, .bar, tr, figure, svg { break-inside: avoid; } h2, h3, h4, .head, .legend { break-after: avoid; }
  thead { display: table-header-group; }
  .scroll { overflow: visible; } th, td { padding: .12rem .3rem; font-size: 7.5pt; white-space: normal; }
  th:first-child { position: static; }
}
"""
