"""The look of trees and reports in a notebook, as CSS.

All text has one width and takes its colour from the page, so that it suits the themes of Jupyter, of
VS Code and of a plain page; greys are the text colour with less opacity, or half-transparent. The rules
that name a class twice are stronger than Jupyter's own rules for tables.
"""

__all__ = ["STYLE"]

STYLE = """<style>
.paramtree,.paramtree-report{font:12px/1.6 ui-monospace,SFMono-Regular,Menlo,Consolas,
"DejaVu Sans Mono",monospace;color:inherit;text-align:left;overflow-x:auto;padding:2px 0 6px}
:is(.paramtree,.paramtree-report) .pt-title{font-weight:600;position:sticky;left:0;padding-bottom:2px}
.paramtree>details,.paramtree>.pt-row{min-width:calc(var(--pt-least) + var(--pt-gaps)*1ch);
max-width:calc(var(--pt-most) + var(--pt-gaps)*2ch)}
.paramtree .pt-group{content-visibility:auto;contain-intrinsic-size:auto 1.6em}
.paramtree summary,.paramtree .pt-row{display:grid;grid-template-columns:var(--pt-columns);
column-gap:clamp(1ch,calc((100% - var(--pt-least))/var(--pt-gaps)),2ch);white-space:pre}
.paramtree summary{cursor:pointer;list-style:none}
.paramtree summary::-webkit-details-marker{display:none}
.paramtree summary:hover,.paramtree .pt-row:hover{background:rgba(128,128,128,.15)}
.paramtree summary>*,.paramtree .pt-row>*{overflow:hidden;text-overflow:ellipsis}
.paramtree .pt-row>:first-child{padding-left:calc(var(--pt-level)*2ch + 2ch)}
.paramtree summary>:first-child{padding-left:calc(var(--pt-level)*2ch - 2ch)}
.paramtree b{font-weight:600}
.paramtree summary>:first-child::before{content:"\\25b8";display:inline-block;width:2ch;opacity:.7}
.paramtree details[open]>summary>:first-child::before{content:"\\25be"}
.paramtree .pt-row>:nth-child(n+4),.paramtree summary>*{text-align:right;
font-variant-numeric:tabular-nums}
.paramtree summary>:nth-child(2){grid-column:4}
.paramtree .pt-row>:nth-child(2),.paramtree .pt-row>:nth-child(3){opacity:.75}
.paramtree .pt-row>.pt-note,.paramtree summary>.pt-note{grid-column:-2;text-align:left;opacity:1}
.paramtree summary>:first-child{text-align:left}
.paramtree b~.pt-note.pt-note.pt-note,.paramtree i{opacity:.75}
.paramtree .pt-head{border-bottom:1px solid rgba(128,128,128,.6);margin-bottom:2px}
.paramtree .pt-head>*{opacity:.75}
.paramtree .pt-bad{font-weight:700;background:rgba(225,60,40,.3);border-radius:3px;padding:0 .5ch}
.paramtree .pt-tag{border:1px solid rgba(128,128,128,.6);border-radius:3px;padding:0 .5ch}
.paramtree a{color:inherit;text-decoration:underline dotted}
.paramtree :target{background:rgba(255,190,0,.35)}
.paramtree svg{display:block;height:1.5em;width:100%;fill:currentColor;opacity:.65}
.paramtree-report table{border-collapse:collapse;border:0;margin:0;font:inherit;color:inherit}
.paramtree-report.paramtree-report tr:nth-child(n){background:none;border:0}
.paramtree-report.paramtree-report tbody tr:hover{background:rgba(128,128,128,.15)}
.paramtree-report.paramtree-report :is(th,td){font:inherit;text-align:left;vertical-align:top;
border:0;padding:0 2ch 0 0;line-height:1.6;white-space:pre;
max-width:clamp(24ch,60vw,60ch);overflow:hidden;text-overflow:ellipsis}
.paramtree-report.paramtree-report .pt-number{text-align:right;font-variant-numeric:tabular-nums}
.paramtree-report.paramtree-report thead th{border-bottom:1px solid rgba(128,128,128,.6)}
.paramtree-report.paramtree-report tfoot td{font-weight:600}
.paramtree-report.paramtree-report tfoot tr:first-child td{border-top:1px solid rgba(128,128,128,.6)}
.paramtree-report th>*,.paramtree-report .pt-remark{opacity:.75}
</style>"""
