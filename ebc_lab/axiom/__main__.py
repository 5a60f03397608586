"""`python -m ebc_lab.axiom estimate|table`: what training takes, counted, beside what is promised.

An error is one sentence on stderr and exit code 2.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from .memory import CLAIMS, compression_table, estimate_memory, known_name

_TOTAL = "total_compression"
_RATIOS = ("state_compression", "gradient_compression", _TOTAL)


def main(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code."""
    given = _parser().parse_args(arguments)
    try:
        return int(given.command(given))
    except (ValueError, OSError) as error:
        print(_sentence(error), file=sys.stderr)
        return 2


def _sentence(error: Exception) -> str:
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename}: {error.strerror}" if error.filename else error.strerror
    return " ".join(str(error).split()) or type(error).__name__


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ebc_lab.axiom", description="Training with little memory beside the weights."
    )
    commands = parser.add_subparsers(required=True, metavar="estimate|table")

    estimate = commands.add_parser("estimate", help="what training a model takes before activations")
    estimate.add_argument("model", metavar="NAME", help="a known name, or a folder or file with config.json")
    estimate.add_argument("--rank", type=int, default=4, metavar="N", help="of the momentum (4); 0: none")
    estimate.add_argument(
        "--device-gb", type=float, metavar="GB", help="memory of the device, 1e9 bytes each"
    )
    estimate.add_argument("--json", action="store_true")
    estimate.set_defaults(command=_estimate)

    table = commands.add_parser("table", help="true compression of five models beside what is promised")
    table.add_argument("--json", action="store_true")
    table.set_defaults(command=_table)
    return parser


# -- commands ------------------------------------------------------------------------------------------------


def _estimate(given: argparse.Namespace) -> int:
    found = estimate_memory(given.model, rank=given.rank, device_gb=given.device_gb)
    claims = CLAIMS.get(known_name(given.model) or "", {})
    if given.json:
        print(json.dumps(found | {"claims": claims}, indent=2))
    else:
        print(_estimation(given.model, given.rank, found, claims))
    return 0


def _estimation(name: str, rank: int, found: Mapping[str, Any], claims: Mapping[str, float]) -> str:
    both = [found[f"{rule}_state_gb"] + found[f"{rule}_gradients_gb"] for rule in ("adamw", "axiom")]
    whole = [found["adamw_fp32_training_gb"], found["axiom_fp16_training_gb"]]
    rows: list[tuple[str, ...]] = [
        ("", "AdamW, float32", f"AXIOM, 16-bit, rank {rank}", "times less", "promised"),
        ("weights", _gb(found["fp32_gb"]), _gb(found["fp16_gb"]), "2", ""),
        _row("state", found, claims),
        _row("gradients", found, claims),
        ("both", *map(_gb, both), _three(found[_TOTAL]), _claimed(claims, _TOTAL)),
        ("in all", *map(_gb, whole), _three(whole[0] / whole[1]), ""),
    ]
    if not claims:
        rows = [row[:-1] for row in rows]
    largest = f"the largest tensor has {found['largest_tensor']:,}"
    head = f"{name}: {found['parameters']:,} weights, {largest}. GB of 1e9 bytes."
    frozen = f"{_gb(found['int8_gb'])} in INT8, {_gb(found['int4_gb'])} in INT4"
    loaded = f"Weights with linear layers quantised and frozen: {frozen}."
    return "\n".join([head, "", _aligned(rows), "", loaded, found["recommendation"]])


def _row(kind: str, found: Mapping[str, Any], claims: Mapping[str, float]) -> tuple[str, ...]:
    adamw, axiom = f"adamw_{kind}_gb", f"axiom_{kind}_gb"
    ratio = f"{kind.removesuffix('s')}_compression"
    promised = _claimed(claims, ratio)
    if axiom in claims:
        promised += f", {_gb(claims[axiom])}"
    return kind, _gb(found[adamw]), _gb(found[axiom]), _three(found[ratio]), promised


def _table(given: argparse.Namespace) -> int:
    found = compression_table()
    if given.json:
        print(json.dumps(found, indent=2))
        return 0
    head = ("", "state, rank 0 / 4 / 16", "gradients, 4 / 2 bytes", "both, rank 4", "promised")
    rows: list[tuple[str, ...]] = [head]
    for row in found:
        cells = [" / ".join(map(_three, row[kind].values())) for kind in ("state", "gradients", "total")]
        promised = [_claimed(row["claims"], ratio) for ratio in _RATIOS]
        rows.append((row["label"], *cells, " / ".join(promised) if row["claims"] else ""))
    print(_aligned(rows))
    print("Bytes of AdamW with float32 over those of AXIOM; promised: of state / gradients / both.")
    return 0


def _claimed(claims: Mapping[str, float], ratio: str) -> str:
    return _three(claims[ratio]) if ratio in claims else "-"


def _gb(size: float) -> str:
    return f"{_three(size)} GB"


def _three(value: float) -> str:
    """Three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = []
    for row in rows:
        cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
        lines.append("  ".join(cells).rstrip())
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
