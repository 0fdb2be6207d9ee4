"""Draw docs/images/overview.png, the picture in the README, from the measurements: python scripts/docs/picture.py

Left: perplexity before fine-tuning, from scripts/study/results/start_perplexity.json. Right: size of the checkpoint and
peak memory of its conversion, from scripts/bench/results/conversion.json.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
PICTURE = ROOT / "docs" / "images" / "overview.png"
INK, MUTED, BLUE, GREEN, GREY, RED = "#1f2933", "#616e7c", "#3b6fb6", "#2f8f5b", "#b8c2cc", "#c26a4a"
METHODS = {"QLoRA": RED, "LoftQ T5": BLUE, "refined": GREEN}
LABELS = {"LoftQ T5": "--method loftq", "refined": "--method refined"}
RANKS = (4, 16, 64)
SHAPES = ("0.1b", "1b", "3b", "13b")


def read(path: str) -> Any:
    return json.loads((ROOT / path).read_text(encoding="utf-8"))


def draw(path: Path) -> None:
    """Both panels on an opaque card, so that they read on light and dark pages alike."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update({"font.size": 11, "font.family": "DejaVu Sans", "text.color": INK, "axes.labelcolor": MUTED})
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.1), layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.12, wspace=0.06)
    _perplexity(left)
    _memory(right)
    for axes in (left, right):
        axes.spines[["top", "right", "left"]].set_visible(False)
        axes.spines["bottom"].set_color(GREY)
        axes.tick_params(length=0, colors=INK)
        axes.set_yticks([])
    figure.savefig(path, dpi=150, facecolor="white", metadata={"Software": None})


def _perplexity(axes: Any) -> None:
    records = read("scripts/study/results/start_perplexity.json")["records"]
    full = next(r for r in records if r["method"] == "full precision")["perplexity"]["wikitext"]
    found = {(r["method"], r["rank"]): r["perplexity"]["wikitext"] for r in records if r.get("bits") == 2}
    plain = found["QLoRA", RANKS[0]]
    places = range(1, len(RANKS) + 1)
    axes.bar([0], [plain], 0.42, color=METHODS["QLoRA"])
    axes.text(0, plain + 6, f"{plain:.0f}", ha="center")
    for side, method in ((-1, "LoftQ T5"), (1, "refined")):
        heights = [found[method, rank] for rank in RANKS]
        axes.bar([p + 0.22 * side for p in places], heights, 0.42, color=METHODS[method], label=LABELS[method])
        for place, height in zip(places, heights):
            axes.text(place + 0.22 * side, height + 6, f"{height:.0f}", ha="center")
    axes.axhline(full, color=INK, linewidth=1, linestyle=(0, (4, 3)), label=f"full precision: {full:.0f}")
    axes.set_xticks([0, *places], ["--method qlora\nany rank", *(f"rank {rank}" for rank in RANKS)])
    axes.set_ylim(0, plain * 1.12)
    axes.set_title("2-bit start: perplexity before fine-tuning", loc="left", fontsize=12.5, fontweight="bold", pad=22)
    axes.text(0, 1.03, "small trained Llama, WikiText-2 test; lower is better", transform=axes.transAxes, color=MUTED)
    axes.legend(frameon=False, loc="upper right")


def _memory(axes: Any) -> None:
    records = {r["shape"]: r for r in read("scripts/bench/results/conversion.json").values()}
    places = range(len(SHAPES))
    sizes = [records[shape]["source_bytes"] / 2**30 for shape in SHAPES]
    peaks = [records[shape]["peak_memory_bytes"] / 2**30 for shape in SHAPES]
    axes.bar([p - 0.22 for p in places], sizes, 0.42, color=GREY, label="checkpoint on disk")
    axes.bar([p + 0.22 for p in places], peaks, 0.42, color=BLUE, label="peak memory")
    for offset, values in ((-0.22, sizes), (0.22, peaks)):
        for place, value in zip(places, values):
            axes.text(place + offset, value + 0.3, f"{value:.1f}", ha="center")
    names = [f"{shape}\n{_duration(records[shape]['seconds'])}" for shape in SHAPES]
    axes.set_xticks(list(places), names)
    axes.set_ylim(0, max(sizes) * 1.12)
    axes.set_title("Converting on 2 CPU cores: GiB and time", loc="left", fontsize=12.5, fontweight="bold", pad=22)
    axes.text(0, 1.03, "Llama shapes, 2 bits, rank 64, 5 steps", transform=axes.transAxes, color=MUTED)
    axes.legend(frameon=False, loc="upper left")


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 100 else f"{seconds / 60:.1f} min"


if __name__ == "__main__":
    draw(PICTURE)
