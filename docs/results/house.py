"""How large the house is: files, lines of code, classes, public definitions, fields of the config.

    python docs/results/house.py [NAME]     prints the count, and keeps it as NAME in house.json

A line of code is one with a token that is neither a comment nor part of a docstring. Fields of the
config are counted by their dotted names, kinds of one section together.
"""

import argparse
import ast
import io
import json
import subprocess
import tokenize
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
WRITTEN = Path(__file__).with_name("house.json")
SILENT = {tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT}
SILENT |= {tokenize.ENCODING, tokenize.ENDMARKER}


def main() -> None:
    """Count, print, and write under the name that was given."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("name", nargs="?", help="what to keep the count as")
    name = parser.parse_args().name
    found: dict[str, Any] = {"commit": _git("rev-parse", "--short", "HEAD")}
    found |= {part: count(_files(part)) for part in ("kava_jax", "tests")}
    found["config_fields"] = len(config_fields())
    if name:
        kept = json.loads(WRITTEN.read_text("utf-8")) if WRITTEN.is_file() else {}
        kept[name] = found
        WRITTEN.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    print(json.dumps(found, indent=2))


def count(files: list[Path]) -> dict[str, Any]:
    """Sums over Python files; ``largest`` is the file with the most lines of all kinds."""
    sizes = {"files": len(files), "lines": 0, "code": 0, "comments": 0, "classes": 0, "public": 0}
    largest = (0, "")
    for path in files:
        text = path.read_text("utf-8")
        tree = ast.parse(text)
        lines = len(text.splitlines())
        largest = max(largest, (lines, str(path.relative_to(ROOT))))
        sizes["lines"] += lines
        sizes["code"] += len(code_lines(text, tree))
        sizes["comments"] += len(
            {
                token.start[0]
                for token in tokenize.generate_tokens(io.StringIO(text).readline)
                if token.type == tokenize.COMMENT
            }
        )
        definitions = (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
        sizes["classes"] += sum(isinstance(node, ast.ClassDef) for node in ast.walk(tree))
        sizes["public"] += sum(
            isinstance(node, definitions) and not node.name.startswith("_") for node in tree.body
        )
    return sizes | {"largest": {"lines": largest[0], "file": largest[1]}}


def code_lines(text: str, tree: ast.Module) -> set[int]:
    """Numbers of the lines that hold code."""
    documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
    strings: set[int] = set()
    for node in ast.walk(tree):
        # A string that is a statement documents: what it stands under, or the field above it.
        for child in node.body if isinstance(node, documented) else ():
            if isinstance(child, ast.Expr) and isinstance(_value(child.value), str):
                strings |= set(range(child.lineno, (child.end_lineno or child.lineno) + 1))
    spoken = (
        range(token.start[0], token.end[0] + 1)
        for token in tokenize.generate_tokens(io.StringIO(text).readline)
        if token.type not in SILENT
    )
    return {line for lines in spoken for line in lines} - strings


def config_fields() -> set[str]:
    """Every field that a config file may set, dotted; the forms of a weight are values."""
    from pydantic import BaseModel

    from kava_jax.config.run import Config

    def below(annotation: Any) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [] if annotation.__name__ in ("Ramp", "AutoShare") else [annotation]
        return [one for part in getattr(annotation, "__args__", ()) for one in below(part)]

    def leaves(model: type[BaseModel], prefix: str = "") -> set[str]:
        found = set()
        for name, field in model.model_fields.items():
            inside = below(field.annotation)
            found |= set().union(*(leaves(one, f"{prefix}{name}.") for one in inside))
            found |= set() if inside else {prefix + name}
        return found

    return leaves(Config)


def _value(node: ast.expr) -> Any:
    return node.value if isinstance(node, ast.Constant) else None


def _files(part: str) -> list[Path]:
    return [ROOT / name for name in _git("ls-files", f"{part}/*.py").splitlines()]


def _git(*arguments: str) -> str:
    call = ["git", "-C", str(ROOT), *arguments]
    return subprocess.run(call, capture_output=True, text=True, check=True).stdout.strip()


if __name__ == "__main__":
    main()
