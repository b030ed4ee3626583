"""The house in numbers: `python -m tests.house [CHECKOUT]` counts rooms, arrows and lines of this project.

A room is an entry of `flextron_lit/`, `callbacks/` or `main.py`; an arrow a pair of rooms with an import, also inside a
function or for types alone. Code lines are those without blanks, comments and docstrings.
"""

import ast
import io
import subprocess
import sys
import tokenize
from collections import defaultdict
from itertools import combinations
from pathlib import Path

ROOT = Path(__file__).parent.parent
PACKAGE, CALLBACKS = "flextron_lit", "callbacks"
ENDINGS = ("", "s", "es", "d", "ed", "ing", "er", "r")
NO_CODE = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT, tokenize.ENDMARKER)


def product(root=ROOT):
    """Every tracked Python file of the product, relative to the checkout, with its text."""
    listed = ["git", "ls-files", "--", f"{PACKAGE}/*.py", f"{CALLBACKS}/*.py", "main.py"]
    paths = subprocess.run(listed, cwd=root, capture_output=True, text=True, check=True).stdout.split()
    return {path: (root / path).read_text(encoding="utf-8") for path in paths}


def module_of(path):
    """Dotted name by which it is imported: callbacks are a part of the package."""
    parts = list(Path(path).with_suffix("").parts)
    parts = [PACKAGE, *parts] if parts[0] == CALLBACKS else parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def room_of(module):
    """The entry of the house that a module stands in."""
    first, _, rest = module.partition(".")
    return (rest.partition(".")[0] or "__init__") if first == PACKAGE else first


def imports(text, package):
    """Dotted names that a file asks for, wherever in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            base = ".".join([*above, *([node.module] if node.module else [])])
            yield from (f"{base}.{alias.name}" for alias in node.names)


def arrows(files):
    """Pairs of rooms, each with the modules that draw it."""
    modules = {module_of(path) for path in files}
    found = defaultdict(set)
    for path, text in files.items():
        module = module_of(path)
        package = module if path.endswith("__init__.py") else module.rpartition(".")[0]
        for name in imports(text, package):
            name = f"{PACKAGE}.{name}" if name.partition(".")[0] == CALLBACKS else name
            target = next((each for each in (name, name.rpartition(".")[0]) if each in modules), None)
            if target is not None and room_of(target) != room_of(module):
                found[room_of(module), room_of(target)].add((module, target))
    return dict(found)


def entries(files):
    """What stands in the package's folder, the link to the callbacks included."""
    inside = {path.split("/")[1] for path in files if path.startswith(f"{PACKAGE}/")}
    linked = {CALLBACKS} if any(module_of(path) == f"{PACKAGE}.{CALLBACKS}" for path in files) else set()
    return (inside | linked) - {"__init__.py", "__main__.py"}


def code_lines(text):
    """Lines that are neither blank nor comment nor docstring."""
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {line for t in tokens if t.type not in NO_CODE for line in range(t.start[0], t.end[0] + 1)}
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    for node in ast.walk(ast.parse(text)):
        for each in node.body if isinstance(node, documented) else ():
            if (
                isinstance(each, ast.Expr)
                and isinstance(each.value, ast.Constant)
                and isinstance(each.value.value, str)
            ):
                lines -= set(range(each.lineno, each.end_lineno + 1))
    return len(lines)


def longest_functions(files):
    """Lines, and where, of every function, the longest first."""
    functions = (
        (node.end_lineno - node.lineno + 1, f"{path}: {node.name}")
        for path, text in files.items()
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)
    )
    return sorted(functions, reverse=True)


def alike(files):
    """Pairs of names of modules and folders that differ by an ending alone."""
    names = {part for path in files for part in Path(path).with_suffix("").parts} - {"__init__", "__main__"}
    return sorted(pair for pair in combinations(sorted(names), 2) if _forms(pair[0]) & _forms(pair[1]))


def _forms(name):
    """What is left of a name without an ending it may have."""
    return {name.removesuffix(ending) for ending in ENDINGS if len(name) - len(ending) > 3}


def main(root):
    files = product(root)
    drawn, rooms = arrows(files), {room_of(module_of(path)) for path in files}
    both_ways = sorted(pair for pair in drawn if pair[::-1] in drawn and pair[0] < pair[1])
    lines, code = (sum(map(count, files.values())) for count in (lambda text: text.count("\n"), code_lines))
    print(f"{len(rooms)} rooms, {len(drawn)} arrows, both ways: {both_ways or 'none'}")
    print(f"{len(entries(files))} entries of {PACKAGE}/: {' '.join(sorted(entries(files)))}")
    print(f"{len(files)} files, {lines} lines, of code {code}")
    print(f"longest file: {max((text.count(chr(10)), path) for path, text in files.items())}")
    print(f"longest functions: {longest_functions(files)[:3]}")
    print(f"names that differ by an ending alone: {alike(files) or 'none'}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT)
