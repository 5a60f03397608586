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
    parsed = _parser().parse_args(arguments)
    try:
        return int(parsed.command(parsed))
    except (ValueError, OSError) as error:
        message = " ".join(str(error).split()) or type(error).__name__
        if isinstance(error, OSError) and error.strerror:
            message = f"{error.filename}: {error.strerror}" if error.filename else error.strerror
        print(message, file=sys.stderr)
        return 2


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m ebc_lab.axiom", description="Training with little memory beside the weights."
    )
    commands = parser.add_subparsers(required=True, metavar="estimate|table")

    estimate = commands.add_parser("estimate", help="what training a model takes before activations")
    estimate.add_argument("model", metavar="NAME", help="a known name, or a folder or file with config.json")
    estimate.add_argument("--rank", type=int, default=4, metavar="N", help="of the momentum (4); 0: none")
    memory = "memory of the device, 1e9 bytes each"
    estimate.add_argument("--device-gb", type=float, metavar="GB", help=memory)
    estimate.add_argument("--json", action="store_true")
    estimate.set_defaults(command=_estimate)

    table = commands.add_parser("table", help="true compression of five models beside what is promised")
    table.add_argument("--json", action="store_true")
    table.set_defaults(command=_table)
    return parser


# -- commands ------------------------------------------------------------------------------------------------


def _estimate(parsed: argparse.Namespace) -> int:
    sizes = estimate_memory(parsed.model, rank=parsed.rank, device_gb=parsed.device_gb)
    claims = CLAIMS.get(known_name(parsed.model) or "", {})
    if parsed.json:
        print(json.dumps(sizes | {"claims": claims}, indent=2))
    else:
        print(_estimation(parsed.model, parsed.rank, sizes, claims))
    return 0


def _estimation(name: str, rank: int, sizes: Mapping[str, Any], claims: Mapping[str, float]) -> str:
    both = [sizes[f"{rule}_state_gb"] + sizes[f"{rule}_gradients_gb"] for rule in ("adamw", "axiom")]
    whole = [sizes["adamw_fp32_training_gb"], sizes["axiom_fp16_training_gb"]]
    rows: list[tuple[str, ...]] = [
        ("", "AdamW, float32", f"AXIOM, 16-bit, rank {rank}", "times less", "promised"),
        ("weights", _gb(sizes["fp32_gb"]), _gb(sizes["fp16_gb"]), "2", ""),
        _row("state", sizes, claims),
        _row("gradients", sizes, claims),
        ("both", *map(_gb, both), _three(sizes[_TOTAL]), _claimed(claims, _TOTAL)),
        ("in all", *map(_gb, whole), _three(whole[0] / whole[1]), ""),
    ]
    if not claims:
        rows = [row[:-1] for row in rows]
    largest = f"the largest tensor has {sizes['largest_tensor']:,}"
    head = f"{name}: {sizes['parameters']:,} weights, {largest}. GB of 1e9 bytes."
    frozen = f"{_gb(sizes['int8_gb'])} in INT8, {_gb(sizes['int4_gb'])} in INT4"
    loaded = f"Weights with linear layers quantised and frozen: {frozen}."
    return "\n".join([head, "", _aligned(rows), "", loaded, sizes["recommendation"]])


def _row(kind: str, sizes: Mapping[str, Any], claims: Mapping[str, float]) -> tuple[str, ...]:
    adamw, axiom = f"adamw_{kind}_gb", f"axiom_{kind}_gb"
    ratio = f"{kind.removesuffix('s')}_compression"
    promised = _claimed(claims, ratio)
    if axiom in claims:
        promised += f", {_gb(claims[axiom])}"
    return kind, _gb(sizes[adamw]), _gb(sizes[axiom]), _three(sizes[ratio]), promised


def _table(parsed: argparse.Namespace) -> int:
    models = compression_table()
    if parsed.json:
        print(json.dumps(models, indent=2))
        return 0
    head = ("", "state, rank 0 / 4 / 16", "gradients, 4 / 2 bytes", "both, rank 4", "promised")
    rows: list[tuple[str, ...]] = [head]
    for row in models:
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
    """Write three digits, or all those before the point."""
    return f"{value:,.0f}" if value >= 99.95 else f"{value:#.3g}"


def _aligned(rows: Sequence[Sequence[str]]) -> str:
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    padded = (map(str.ljust, row, widths) for row in rows)
    return "\n".join("  ".join(cells).rstrip() for cells in padded)


if __name__ == "__main__":
    sys.exit(main())
