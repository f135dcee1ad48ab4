"""What a file's code refers to, read without running it."""

from __future__ import annotations

import ast

IMPORTERS = {"__import__", "importlib.import_module", "importlib.__import__", "builtins.__import__"}


class Names(ast.NodeVisitor):
    """Every dotted name that a file uses, in full: whatever it imported or assigned under another name."""

    def __init__(self, code: str):
        self.meant: dict[str, str] = {}
        self.found: set[str] = set()
        tree = ast.parse(code)
        self.visit(tree)  # twice, for names that are used above their import
        self.visit(tree)

    def visit_Import(self, node: ast.Import) -> None:
        for alias in node.names:
            self.found.add(alias.name)
            self.meant[alias.asname or alias.name.split(".")[0]] = (
                alias.name if alias.asname else alias.name.split(".")[0]
            )

    def visit_ImportFrom(self, node: ast.ImportFrom) -> None:
        for alias in node.names:
            name = f"{'.' * node.level}{node.module or ''}.{alias.name}"
            self.found.add(name)
            self.meant[alias.asname or alias.name] = name

    def visit_Assign(self, node: ast.Assign) -> None:
        self.generic_visit(node)
        for target in node.targets:
            if isinstance(target, ast.Name) and (name := self.full(node.value)):
                self.meant[target.id] = name

    def visit_Name(self, node: ast.Name) -> None:
        self.found.add(self.full(node))

    def visit_Attribute(self, node: ast.Attribute) -> None:
        self.found.add(self.full(node) or f"?.{node.attr}")
        self.generic_visit(node)

    def visit_Call(self, node: ast.Call) -> None:
        self.found.add(self.full(node) or "?")
        self.generic_visit(node)

    def full(self, node: ast.expr) -> str | None:
        """The dotted name that an expression stands for, None where it is no name."""
        match node:
            case ast.Name(name):
                return self.meant.get(name, name)
            case ast.Attribute(value, name) if whole := self.full(value):
                return f"{whole}.{name}"
            case ast.Call(ast.Name("getattr"), [value, ast.Constant(str(name)), *_]) if whole := self.full(value):
                return f"{whole}.{name}"
            case ast.Call(function, [ast.Constant(str(name)), *_]) if self.full(function) in IMPORTERS:
                return name
            case ast.Call(function) if self.full(function) in IMPORTERS:
                return "pickle, for all that can be seen"
        return None
