"""What was generated, and how it ended."""

from __future__ import annotations

import json
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.fuzzing.runner import Outcome


@dataclass
class Table:
    """Cases by command and kind of damage."""

    seed: int
    ends: dict[tuple[str, str], Counter[int]] = field(default_factory=lambda: defaultdict(Counter))
    slowest: float = 0.0
    most_memory: int = 0
    findings: int = 0

    def add(self, outcome: Outcome) -> None:
        streamed = " (streamed)" if outcome.kind.endswith(" streamed") else ""
        self.ends[outcome.command, outcome.damage + streamed][outcome.code] += 1
        self.slowest = max(self.slowest, outcome.seconds)
        self.most_memory = max(self.most_memory, outcome.grown)
        self.findings += bool(outcome.findings)

    def as_dict(self, seconds: float) -> dict[str, Any]:
        rows = [
            {
                "command": command,
                "damage": damage,
                "cases": ends.total(),
                "exit_codes": {str(code): count for code, count in sorted(ends.items())},
            }
            for (command, damage), ends in sorted(self.ends.items())
        ]
        return {
            "seed": self.seed,
            "cases": sum(row["cases"] for row in rows),
            "seconds": round(seconds, 1),
            "slowest_seconds": round(self.slowest, 2),
            "most_memory_bytes": self.most_memory,
            "findings": self.findings,
            "rows": rows,
        }

    def write(self, path: Path, seconds: float) -> None:
        path.write_text(json.dumps(self.as_dict(seconds), indent=1) + "\n", encoding="utf-8")

    def summary(self, seconds: float) -> str:
        commands, codes = Counter[str](), Counter[int]()
        for (command, _), ends in self.ends.items():
            commands[command] += ends.total()
            codes += ends
        return (
            f"seed {self.seed}: {commands.total()} cases in {seconds:.0f} s, slowest {self.slowest:.1f} s, at most "
            f"{self.most_memory / 1e6:.0f} MB more memory; exit codes {dict(sorted(codes.items()))}; commands "
            f"{dict(sorted(commands.items()))}; {len(self.ends)} kinds; {self.findings} with findings"
        )
