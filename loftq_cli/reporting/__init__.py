"""One self-contained page that shows conversions side by side: tiles, heatmaps, charts and tables, without a network.

The records become frozen dataclasses (`data`), those become drawings and tables (`svg`, `sections`), and `page` joins
them. All of that is pure; `job` reads the directories and writes the file.
"""
