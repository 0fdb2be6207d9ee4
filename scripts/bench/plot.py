"""The records in scripts/bench/results/ as one picture (bench.png) and one Markdown table (TABLE.md) beside them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from machine import RESULTS

Records = dict[str, dict[str, Any]]


def read(name: str) -> Records:
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def table(matrix: Records, conversion: Records) -> str:
    """Both kinds of record, each with the machine it was taken on."""
    lines = ["# Benchmarks", "", "Made by `scripts/bench/plot.py` from the JSON files beside it.", ""]
    lines += [
        "| one matrix | machine | ours, s | full SVD, s | times faster | kept residual over exact |",
        "|---|---|---:|---:|---:|---:|",
    ]
    for key, record in matrix.items():
        svd = record.get("full_svd", {}).get("seconds", "")
        lines.append(
            f"| {key} | {_machine(record)} | {record['ours']['seconds']} | {svd} | {record.get('times_faster', '')} | "
            f"{record.get('kept_residual_ratio', '')} |"
        )
    lines += ["", "| whole conversion | machine | s | s per 10⁹ parameters | of those quantized | times the floor | "]
    lines[-1] += "plan said, s | peak, GiB |"
    lines += ["|---|---|---:|---:|---:|---:|---:|---:|"]
    for key, record in conversion.items():
        peak = record["peak_device_memory_bytes"] or record["peak_memory_bytes"]
        lines.append(
            f"| {key} | {_machine(record)} | {record['seconds']:.1f} | {record['seconds_per_billion']:.1f} | "
            f"{record['seconds_per_billion_quantized']:.1f} | {record.get('times_the_floor', '')} | "
            f"{record.get('estimated_seconds', '')} | {peak / 2**30:.2f} |"
        )
    return "\n".join(lines) + "\n"


def picture(matrix: Records, conversion: Records, quality: Records, path: Path) -> None:
    """Speed against the full SVD, cost per weight, peak memory, distribution of residual ratios."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(2, 2, figsize=(12, 8), layout="constrained")
    faster = {key: r["times_faster"] for key, r in matrix.items() if "times_faster" in r}
    _bars(axes[0, 0], faster, "times faster than the full-SVD algorithm", "{:.0f}")
    cost = {key: r["seconds_per_billion"] for key, r in conversion.items()}
    _bars(axes[0, 1], cost, "seconds per 10⁹ parameters", "{:.1f}")
    peak = {k: (r["peak_device_memory_bytes"] or r["peak_memory_bytes"]) / 2**30 for k, r in conversion.items()}
    _bars(axes[1, 0], peak, "peak memory, GiB", "{:.2f}")
    ratios = [100 * (value - 1) for record in quality.values() for value in record["ratios"]]
    axes[1, 1].hist(ratios, bins=60, color="#4878a8")
    axes[1, 1].axvline(0.1, color="#a84848", linestyle="--")
    axes[1, 1].set_title("residual above that with exact SVDs, %, trained matrices", fontsize=10)
    figure.savefig(path, dpi=110)


def _bars(axis: Any, values: dict[str, float], title: str, form: str) -> None:
    names = list(values)[::-1]
    bars = axis.barh(names, [values[name] for name in names], color="#4878a8")
    axis.bar_label(bars, labels=[form.format(values[name]) for name in names], padding=3, fontsize=8)
    axis.tick_params(axis="y", labelsize=8)
    axis.set_title(title, fontsize=10)
    axis.margins(x=0.15)


def _machine(record: dict[str, Any]) -> str:
    machine = record["machine"]
    return machine["gpu"] or f"{machine['cpu']}, {machine['threads']} threads"


def main() -> None:
    matrix = dict(sorted(read("matrix").items(), key=lambda item: (int(item[0].split("x")[0]), item[0])))
    conversion = dict(sorted(read("conversion").items(), key=lambda item: item[1]["parameters"]))
    quality = read("quality")
    (RESULTS / "TABLE.md").write_text(table(matrix, conversion))
    picture(matrix, conversion, quality, RESULTS / "bench.png")
    print(RESULTS / "bench.png")


if __name__ == "__main__":
    main()
