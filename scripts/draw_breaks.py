"""Draws breaks for scripts/mutations.py at random: python scripts/draw_breaks.py [COUNT [SEED]]

Prints lines of scripts/mutations.txt. Each room of ebc_lab (a folder, or the files beside the folders) has as
many breaks as its share of all lines of code in functions; within a room every line that some change
fits is as likely as any other. A line that stands twice in its file is left out, as are messages, for a word
in one breaks nothing, and what runs for a type checker only. Some breaks change nothing that can be seen:
read them before you count them.
"""

from __future__ import annotations

import argparse
import ast
import random
from collections import Counter, defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "ebc_lab"
SWAPPED: dict[type[ast.AST], Any] = {
    ast.Lt: ast.LtE,
    ast.LtE: ast.Lt,
    ast.Gt: ast.GtE,
    ast.GtE: ast.Gt,
    ast.Eq: ast.NotEq,
    ast.NotEq: ast.Eq,
    ast.In: ast.NotIn,
    ast.NotIn: ast.In,
    ast.Is: ast.IsNot,
    ast.IsNot: ast.Is,
    ast.And: ast.Or,
    ast.Or: ast.And,
    ast.Add: ast.Sub,
    ast.Sub: ast.Add,
    ast.Mult: ast.Div,
    ast.Div: ast.Mult,
    ast.FloorDiv: ast.Mult,
    ast.Mod: ast.Mult,
    ast.Pow: ast.Mult,
}
NAMES = {"min": "max", "max": "min", "any": "all", "all": "any", "sum": "len", "sorted": "list"}


def changed(node: ast.AST) -> ast.AST | None:
    """The node, changed in one place of its own; None where nothing of it can be."""
    match node:
        case ast.Compare(left=left, ops=[op], comparators=others):
            return ast.Compare(left, [SWAPPED[type(op)]()], others)
        case ast.BoolOp(op=op, values=values):
            return ast.BoolOp(SWAPPED[type(op)](), values)
        case ast.BinOp(left=left, op=op, right=right) if type(op) in SWAPPED and not _is_text(node):
            return ast.BinOp(left, SWAPPED[type(op)](), right)
        case ast.UnaryOp(op=ast.Not(), operand=operand):
            return operand
        case ast.IfExp(test=test, body=body, orelse=orelse):
            return ast.IfExp(test, orelse, body)
        case ast.Constant(value=bool(value)):
            return ast.Constant(not value)
        case ast.Constant(value=int() | float() as value):
            return ast.Constant(value + 1)
        case ast.Call(func=ast.Name(id=name), args=args, keywords=keywords) if name in NAMES:
            return ast.Call(ast.Name(NAMES[name]), args, [k for k in keywords if NAMES[name] != "list"])
    return None


def _is_text(node: ast.AST) -> bool:
    return any(isinstance(n, ast.JoinedStr) or _string(n) for n in ast.walk(node))


def _string(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str)


def whole(node: ast.stmt) -> str | None:
    """What becomes of a statement as a whole; None where nothing does."""
    match node:
        case ast.Return(value=ast.expr()):
            return "return None"
        case ast.Expr(value=ast.Call()):
            return "pass"
        case ast.AugAssign(target=target, op=op, value=value) if type(op) in SWAPPED and not _is_text(value):
            return ast.unparse(ast.AugAssign(target, SWAPPED[type(op)](), value))
    return None


def parts(node: ast.AST, inside: bool = False) -> Iterator[tuple[ast.expr | ast.stmt, str]]:
    """The parts of functions that something can be made of, and what: for one node, maybe several."""
    if isinstance(node, (ast.Raise, ast.Assert, ast.JoinedStr, ast.arguments)):
        return  # messages, what holds anyway, and defaults
    if inside and isinstance(node, ast.stmt) and (text := whole(node)):
        yield node, text
    if inside and isinstance(node, ast.If):
        yield node.test, f"not ({ast.unparse(node.test)})"
    if inside and isinstance(node, ast.expr) and (other := changed(node)):
        text = ast.unparse(ast.fix_missing_locations(other))
        yield node, text if isinstance(node, (ast.Constant, ast.Call)) else f"({text})"
    for child in ast.iter_child_nodes(node):
        yield from parts(child, inside or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)))


def breaks(path: Path) -> dict[str, list[str]]:
    """Line of a file -> what may become of it."""
    source = path.read_text()
    lines = source.splitlines()
    stands = Counter(line.strip() for line in lines)
    found: defaultdict[str, list[str]] = defaultdict(list)
    for node, text in parts(ast.parse(source)):
        line = lines[node.lineno - 1]
        if node.end_lineno == node.lineno and stands[line.strip()] == 1:
            bytes_ = line.encode()
            broken = bytes_[: node.col_offset].decode() + text + bytes_[node.end_col_offset :].decode()
            if broken != line:
                found[line.strip()].append(broken.strip())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("count", nargs="?", type=int, default=200)
    parser.add_argument("seed", nargs="?", type=int, default=0)
    asked = parser.parse_args()
    drawn = random.Random(asked.seed)
    rooms: defaultdict[str, list[tuple[str, str, list[str]]]] = defaultdict(list)
    for path in sorted(PACKAGE.rglob("*.py")):
        inside = path.relative_to(PACKAGE)
        room = inside.parts[0] if len(inside.parts) > 1 else ""
        rooms[room] += [(str(path.relative_to(ROOT)), *each) for each in breaks(path).items()]
    total = sum(map(len, rooms.values()))
    # the largest remainders make the shares add up
    exact = {room: asked.count * len(lines) / total for room, lines in rooms.items()}
    counts = {room: int(share) for room, share in exact.items()}
    for room in sorted(exact, key=lambda r: counts[r] - exact[r])[: asked.count - sum(counts.values())]:
        counts[room] += 1
    for room, lines in sorted(rooms.items()):
        for file, line, broken in sorted(drawn.sample(lines, counts[room])):
            print(file, f"- {line}", f"+ {drawn.choice(broken)}", sep="\n")


if __name__ == "__main__":
    main()
