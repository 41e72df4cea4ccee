"""The program file keeps the order that its docstring promises: sections from the ground up, short functions, one broad except."""

from __future__ import annotations

import ast
import functools
import re
import symtable
from collections.abc import Iterator

from tests.conftest import ROOT

SOURCE = (ROOT / "grace.py").read_text(encoding="utf-8")
TREE = ast.parse(SOURCE)
LONGEST = 60
Definition = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef


@functools.cache
def banners() -> list[tuple[str, int]]:
    """Each section's name and the number of the line that names it."""
    lines = SOURCE.splitlines()
    return [(lines[n].removeprefix("# "), n + 1) for n in range(1, len(lines)) if re.fullmatch(r"# =+", lines[n - 1])]


def section_of(line: int) -> int:
    """The index of the section that a line lies in; -1 above the first."""
    return sum(start <= line for _, start in banners()) - 1


class WithoutAnnotations(ast.NodeTransformer):
    """The same statement without the annotations, which are never evaluated."""

    def visit_arg(self, node: ast.arg) -> ast.arg:
        node.annotation = None
        return node

    def visit_FunctionDef(self, node: ast.FunctionDef) -> ast.AST:
        node.returns = None
        return self.generic_visit(node)

    def visit_AnnAssign(self, node: ast.AnnAssign) -> ast.AST:
        self.generic_visit(node)
        return ast.Assign([node.target], node.value, lineno=node.lineno) if node.value is not None else ast.Pass()


def tables(table: symtable.SymbolTable) -> Iterator[symtable.SymbolTable]:
    yield table
    for child in table.get_children():
        yield from tables(child)


def global_names_used(statement: ast.stmt) -> set[str]:
    """The module-level names that a top-level statement reads, its functions' bodies included."""
    bare = WithoutAnnotations().visit(ast.parse(ast.unparse(statement)))
    top, *inner = tables(symtable.symtable(ast.unparse(ast.fix_missing_locations(bare)), "grace.py", "exec"))
    used = {symbol.get_name() for symbol in top.get_symbols() if symbol.is_referenced()}
    return used | {symbol.get_name() for table in inner for symbol in table.get_symbols() if symbol.is_global() and symbol.is_referenced()}


def names_made(statement: ast.stmt) -> Iterator[str]:
    """The module-level names that a top-level statement defines."""
    if isinstance(statement, Definition):
        yield statement.name
    elif isinstance(statement, ast.Assign | ast.AnnAssign):
        targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
        yield from (node.id for target in targets for node in ast.walk(target) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store))


def functions() -> list[ast.FunctionDef | ast.AsyncFunctionDef]:
    return [node for node in ast.walk(TREE) if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_banners_follow_the_map_in_the_docstring() -> None:
    """The table of contents and the file name the same sections in the same order."""
    text = ast.get_docstring(TREE, clean=False) or ""
    promised = re.findall(r"^ {4}(\w+(?: \w+)*) {2,}\S", text[: text.index("To add")], re.MULTILINE)
    assert len(promised) >= 10
    assert [name for name, _ in banners()] == promised


def test_each_banner_is_followed_by_the_idea_of_its_section() -> None:
    """Two to five lines of prose stand under each section's name."""
    lines = SOURCE.splitlines()
    for name, number in banners():
        idea = 0
        while lines[number + idea].startswith("# "):
            idea += 1
        assert 2 <= idea <= 5, f"the section {name!r} has {idea} lines of prose"


def test_the_reader_of_names_tells_globals_from_locals() -> None:
    """The check below sees what it must see: bodies, defaults and decorators, but no locals, attributes or annotations."""
    text = "@mark\ndef f(a: Hidden, b=DEFAULT) -> Hidden:\n    local: Hidden = a.attribute\n    inner = lambda x: x + FAR\n    return [local for y in Z]"
    assert global_names_used(ast.parse(text).body[0]) == {"mark", "DEFAULT", "FAR", "Z"}


def test_no_section_uses_a_name_of_a_later_one() -> None:
    """Any prefix of the file stands alone."""
    home = {name: section_of(statement.lineno) for statement in TREE.body for name in names_made(statement)}
    assert len(home) > 100
    titles = [name for name, _ in banners()]
    wrong = [f"line {statement.lineno}, {titles[here]}: uses {name} of {titles[home[name]]}"
             for statement in TREE.body for here in [section_of(statement.lineno)]
             for name in sorted(global_names_used(statement)) if home.get(name, -1) > here]  # fmt: skip
    assert not wrong, "\n".join(wrong)


def test_no_function_is_longer_than_a_screen() -> None:
    """A function is one thought."""
    long = [f"{node.name}: {node.end_lineno - node.lineno + 1} lines" for node in functions()
            if node.end_lineno is not None and node.end_lineno - node.lineno + 1 > LONGEST]  # fmt: skip
    assert not long, ", ".join(long)


def test_every_exception_is_caught_at_most_once_and_in_the_daemon() -> None:
    """Only the daemon's outermost loop outlives an error that nobody foresaw; whoever else catches all raises it again."""
    handlers = [node for node in ast.walk(TREE) if isinstance(node, ast.ExceptHandler)]
    names = {node: {part.id for part in ast.walk(node.type) if isinstance(part, ast.Name)} if node.type else {"everything"} for node in handlers}
    broad = [node.lineno for node in handlers if names[node] & {"Exception", "everything"}]
    assert len(broad) <= 1, f"broad excepts at lines {broad}"
    titles = [name for name, _ in banners()]
    assert all(titles[section_of(line)] == "daemon" for line in broad)
    for node in handlers:
        if "BaseException" in names[node]:
            assert isinstance(node.body[-1], ast.Raise) and node.body[-1].exc is None, f"line {node.lineno} swallows what it caught"


def test_the_program_is_one_file() -> None:
    """No other module lies at the root."""
    assert [path.name for path in sorted(ROOT.glob("*.py"))] == ["grace.py"]
