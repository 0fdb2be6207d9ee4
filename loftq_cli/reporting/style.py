"""The style and the script of the page. Neither depends on what is reported."""

from __future__ import annotations

import base64
import hashlib

# From pale to strong on a light page, from dim to bright on a dark one.
_LIGHT = ["#e8f1fa", "#cfe2f3", "#b0d0ea", "#8cbadf", "#69a3d3", "#4b8bc4", "#3273b1", "#1f5b97", "#12447a", "#0a2d57"]
_DARK = ["#17263a", "#1a3350", "#1e4268", "#235380", "#2b6598", "#3a7ab0", "#5391c6", "#74aadb", "#9bc5ec", "#cbe3fb"]


def _levels(colours: list[str]) -> str:
    return "".join(f"--h{level}:{colour};" for level, colour in enumerate(colours))


_CLASSES = "".join(f".h{level}{{fill:var(--h{level})}}" for level in range(len(_LIGHT)))
_SERIES = "".join(
    f".line.s{hue}{{stroke:var(--s{hue})}}.band.s{hue},.bar.s{hue},.dot.s{hue}{{fill:var(--s{hue})}}"
    f".key.s{hue}::before{{background:var(--s{hue})}}.part.s{hue},i.s{hue}{{background:var(--s{hue})}}"
    for hue in range(1, 8)
)
STYLE = f"""
:root{{color-scheme:light dark;--bg:#f6f7f9;--card:#fff;--ink:#1b2330;--muted:#5a6676;--rule:#dfe3e9;
--s1:#2f6fb3;--s2:#c2571a;--s3:#3b8a4c;--s4:#8a5fb0;--s5:#b08a1e;--s6:#4a9aa5;--s7:#7d8793;{_levels(_LIGHT)}}}
@media screen and (prefers-color-scheme:dark){{:root{{--bg:#0f141b;--card:#171e28;--ink:#e4e9f0;--muted:#9aa7b8;
--rule:#2b3543;--s1:#6aa9e6;--s2:#e8935a;--s3:#76c287;--s4:#b897dc;--s5:#d6b455;--s6:#7cc4ce;--s7:#9aa4b1;
{_levels(_DARK)}}}}}
*{{box-sizing:border-box}}
body{{margin:0 auto;padding:1.25rem 1rem 3rem;max-width:80rem;background:var(--bg);color:var(--ink);
font:15px/1.45 system-ui,-apple-system,"Segoe UI",Roboto,"Helvetica Neue",Arial,sans-serif}}
h1{{font-size:1.5rem;margin:0 0 .2rem}}h2{{font-size:1.1rem;margin:0 0 .3rem}}h3{{font-size:.95rem;margin:0 0 .5rem;
overflow-wrap:anywhere}}h4{{font-size:.8rem;margin:.9rem 0 .2rem;color:var(--muted);font-weight:600;
overflow-wrap:anywhere}}
p{{margin:.25rem 0 .6rem}}header p,section>p,.scale,.legend,.card p{{color:var(--muted);font-size:.85rem}}
section{{margin:1.6rem 0 0}}
.columns{{display:grid;gap:1rem;grid-template-columns:repeat(auto-fit,minmax(min(100%,21rem),1fr));align-items:start}}
.card{{background:var(--card);border:1px solid var(--rule);border-radius:.6rem;padding:.9rem 1rem;min-width:0}}
.tiles{{display:grid;gap:.6rem;grid-template-columns:repeat(auto-fit,minmax(8.6rem,1fr))}}
.tile{{border:1px solid var(--rule);border-radius:.5rem;padding:.55rem .7rem;min-width:0}}
.tile b{{display:block;font-size:1.1rem;font-weight:650;line-height:1.25;font-variant-numeric:tabular-nums}}
.tile span{{color:var(--muted);font-size:.78rem;display:block}}
@media screen and (min-width:60rem){{.single main{{columns:2;column-gap:1rem}}
.single main>section{{break-inside:avoid;margin:0 0 1rem}}.single main>section.whole{{column-span:all}}}}
.single section.whole{{margin-bottom:1rem}}
svg{{display:block;width:100%;height:auto}}svg text{{font-size:10px;fill:var(--muted)}}
svg text.name{{fill:var(--ink);font-weight:600}}
.chart{{max-width:36rem}}.scale svg{{display:inline;width:auto;vertical-align:-1px}}
.grid{{stroke:var(--rule);stroke-width:1;fill:none}}.line{{fill:none;stroke-width:2}}.band{{opacity:.18}}
rect:hover,.dot:hover{{stroke:var(--ink);stroke-width:1.5}}
{_CLASSES}{_SERIES}
.key{{margin-right:1rem;white-space:nowrap}}.key::before{{content:"";display:inline-block;width:.8em;height:.2em;
margin-right:.4em;vertical-align:.25em}}
.bar-row{{display:flex;height:1.1rem;border-radius:.3rem;overflow:hidden;margin:.2rem 0 .6rem;gap:1px}}
.part{{display:block;min-width:1px}}td i{{display:inline-block;width:.7em;height:.7em;border-radius:2px;
margin-right:.4em}}
.wide{{overflow-x:auto}}table{{border-collapse:collapse;width:100%;font-size:.83rem}}
th,td{{text-align:left;padding:.28rem .8rem .28rem 0;border-bottom:1px solid var(--rule);vertical-align:top}}
tbody th{{font-weight:500;overflow-wrap:anywhere}}thead th{{color:var(--muted);font-weight:600;white-space:nowrap}}
td{{font-variant-numeric:tabular-nums}}.numbers td,.numbers thead th:not(:first-child){{text-align:right;
white-space:nowrap;padding-right:.2rem;padding-left:.6rem}}
.values td{{overflow-wrap:anywhere;min-width:9rem}}.values tbody th{{min-width:7rem}}
th i{{display:inline-block;width:.7em;height:.7em;border-radius:2px;margin-right:.4em}}
code{{font:.78rem/1.4 ui-monospace,SFMono-Regular,Menlo,Consolas,monospace;overflow-wrap:anywhere}}
summary{{cursor:pointer;font-size:.85rem;color:var(--muted)}}
#hint{{position:fixed;left:50%;bottom:.8rem;transform:translateX(-50%);max-width:94vw;padding:.45rem .8rem;
border-radius:.5rem;background:var(--ink);color:var(--bg);font-size:.82rem;overflow-wrap:anywhere}}
#hint:empty{{display:none}}
@media print{{body{{background:#fff;max-width:none;padding:0;font-size:11px;print-color-adjust:exact;
-webkit-print-color-adjust:exact}}.card{{break-inside:avoid}}#hint{{display:none}}}}
""".strip()

# A screen that is touched has no tooltips: a tap shows the same text.
SCRIPT = """
document.addEventListener("click", function (event) {
  var title = event.target.querySelector ? event.target.querySelector(":scope > title") : null;
  document.getElementById("hint").textContent = title ? title.textContent : "";
});
""".strip()


def policy() -> str:
    """Return the content security policy of the page: its own style and this one script, and no requests at all."""
    digest = base64.b64encode(hashlib.sha256(SCRIPT.encode()).digest()).decode()
    return f"default-src 'none'; style-src 'unsafe-inline'; script-src 'sha256-{digest}'; base-uri 'none'"
