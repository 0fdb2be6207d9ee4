"""Join the sections into one HTML page. The same conversions give the same bytes."""

from __future__ import annotations

from collections.abc import Sequence

from loftq_cli._version import __version__
from loftq_cli.reporting.data import Conversion
from loftq_cli.reporting.sections import Section, pictures
from loftq_cli.reporting.style import SCRIPT, STYLE, policy
from loftq_cli.reporting.tables import tables
from loftq_cli.reporting.text import shown

MARK = '<meta name="generator" content="loftq report">'  # by which an older report is recognised


def render_page(conversions: Sequence[Conversion]) -> str:
    """Return the page. It makes no request, and its only script is `style.SCRIPT`."""
    names = [conversion.name for conversion in conversions]
    parts = (*pictures(conversions), *tables(conversions))
    body = "".join(_section(part, names) for part in parts)
    about = ", ".join(shown(_about(conversion)) for conversion in conversions)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
{MARK}
<meta http-equiv="Content-Security-Policy" content="{policy()}">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{shown(" and ".join(names) if len(names) < 3 else f"{len(names)} conversions")}, a loftq report</title>
<style>{STYLE}</style>
</head>
<body class="{"single" if len(names) == 1 else "several"}">
<header><h1>{shown(names[0]) if len(names) == 1 else f"{len(names)} conversions"}</h1><p>{about}</p></header>
<main>{body}</main>
<footer><p>Made by loftq {shown(__version__)} from loftq.json.</p></footer>
<div id="hint" role="status"></div>
<script>{SCRIPT}</script>
</body>
</html>
"""


def _about(conversion: Conversion) -> str:
    manifest = conversion.manifest
    method = manifest.recipe.get("method", "loftq")
    return f"{manifest.architecture or 'checkpoint'} by {method} as {manifest.format}"


def _section(part: Section, names: Sequence[str]) -> str:
    about = f"<p>{part.about}</p>" if part.about else ""
    heading = f"<h2>{part.title}</h2>{about}"
    if part.whole:
        return f"<section>{heading}{part.whole}</section>\n"
    several = len(names) > 1
    cards = "".join(
        f'<div class="card">{f"<h3>{shown(name)}</h3>" if several else ""}{card}</div>'
        for name, card in zip(names, part.cards)
    )
    return f'<section><h2>{part.title}</h2>{about}<div class="columns">{cards}</div></section>\n'
