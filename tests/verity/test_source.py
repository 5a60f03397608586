"""The library's source keeps to single operations: what depends on the instruction set is not in it."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import ebc_lab.verity

FOLDER = Path(ebc_lab.verity.__file__).parent
FILES = sorted(path for path in FOLDER.glob("*.py") if path.name != "__main__.py")  # which times torch
BANNED = {
    *("exp", "exp2", "expm1", "log", "log2", "log10", "log1p", "erf", "erfc", "tanh", "sigmoid", "pow"),
    *("sin", "cos", "tan", "atan2", "rsqrt", "reciprocal", "hypot", "lerp", "lerp_", "addcmul", "addcmul_"),
    *("addcdiv", "addcdiv_", "addmm", "addmv", "addr", "baddbmm", "fma", "mean", "var", "std", "norm"),
    *("vector_norm", "logsumexp", "logcumsumexp", "cumsum", "cumprod", "prod", "dist", "dot", "einsum"),
    *("layer_norm_", "log_softmax", "softmin", "randn", "rand", "randn_like", "normal", "uniform_", "fsum"),
}
OF_TORCH = {  # ours have the names
    *("softmax", "layer_norm", "rms_norm", "gelu", "silu", "cross_entropy", "normal_", "embedding"),
    *("conv2d", "fold", "avg_pool2d", "linear"),
}
ROOTS = {("functions.py", "sqrt64"), ("ops.py", "forward"), ("model.py", "__init__")}  # torch's is not exact
DIVIDING = {("bits.py", "divided"), ("ops.py", "forward"), ("model.py", "__init__")}  # itself; by a sqrt


def calls(tree: ast.AST) -> Iterator[tuple[str, str, ast.Call]]:
    """(what it is called on, name, call)"""
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            f = node.func
            if isinstance(f, ast.Attribute):
                yield ast.unparse(f.value), f.attr, node
            elif isinstance(f, ast.Name):
                yield "", f.id, node


def offences(source: str, name: str) -> list[str]:
    tree = ast.parse(source)
    found = []
    for owner, called, node in calls(tree):
        keywords = {k.arg: ast.unparse(k.value) for k in node.keywords}
        of_torch = called in OF_TORCH and owner.split(".")[0] in ("torch", "F", "nn")
        inexact_sum = called == "sum" and owner and keywords.get("dtype") != "torch.int64"
        if (called in BANNED and owner != "self") or of_torch or inexact_sum or "alpha" in keywords:
            found.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    functions = [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef)]
    rooting = {id(d) for f in functions if (name, f.name) in ROOTS for d in ast.walk(f)}
    for owner, called, node in calls(tree):
        if called in ("sqrt", "sqrt_") and owner and id(node) not in rooting:
            found.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    allowed = {id(d) for f in functions if (name, f.name) in DIVIDING for d in ast.walk(f)}
    for node in ast.walk(tree):
        divides = isinstance(node, ast.BinOp | ast.AugAssign) and isinstance(node.op, ast.Div)
        powers = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
        whole = powers and isinstance(node.right, ast.Constant) and isinstance(node.left, ast.Constant)
        path = divides and isinstance(node.right, ast.JoinedStr | ast.Constant) and "'" in ast.unparse(node)
        if (divides and not path and id(node) not in allowed) or (powers and not whole):
            found.append(f"{name}, line {node.lineno}: {ast.unparse(node)}")
    return found


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_no_operation_depends_on_the_instruction_set(path):
    assert offences(path.read_text(), path.name) == []


@pytest.mark.parametrize(
    "line", ["x.exp()", "torch.softmax(x, 0)", "x.sum(0)", "a.add(b, alpha=2)", "x / 3", "x**0.5"]
)
def test_the_test_notices(line):
    assert offences(line, "ops.py")


def test_the_kernels_use_no_function_of_the_maths_library():
    source = re.sub(r"/\*.*?\*/|//[^\n]*", "", (FOLDER / "kernels.c").read_text(), flags=re.DOTALL)
    called = set(re.findall(r"\b([a-z_0-9]+)\s*\(", source))
    assert called & {"exp", "log", "erf", "erfc", "pow", "fma", "tanh", "cos", "sin", "expf", "logf"} == set()
