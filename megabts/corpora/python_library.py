"""The code and prose domains: the sources and the documentation of the Python installation that runs this.

code    one document per source file of the standard library, docstrings cut out, all else as written.
prose   the docstrings (one document per module), the language reference that `help()` shows, text and HTML files
        of the library, and the docstrings of modules written in C.

A *unit* is a top-level module or package with its private twins (`_decimal` and `_pydecimal` belong to `decimal`).
Train and valid are split by unit, the same for both domains, so a docstring is never valid in one domain while its
code is train in the other. Limit: the texts change with the Python version and its packaging (Debian ships
no tests and puts IDLE elsewhere), so results are comparable only for the same installation.
"""

import ast
import hashlib
import inspect
import sysconfig
import tokenize
import warnings
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import NamedTuple

from megabts.errors import UserError

SKIPPED_FOLDERS = {"site-packages", "dist-packages", "lib-dynload", "__pycache__", "test", "tests", "idle_test"}
SKIPPED_FILES = ("_sysconfigdata", "sitecustomize", "usercustomize", "Grammar", "PatternGrammar")
TWINS = {
    "genericpath": "os", "ntpath": "os", "posixpath": "os", "nturl2path": "urllib", "posix": "os",
    "sre": "re", "sre_compile": "re", "sre_constants": "re", "sre_parse": "re",
    "cProfile": "profile", "lsprof": "profile", "pstats": "profile",
    "threading_local": "threading", "strptime": "time", "compat_pickle": "pickle", "imp": "importlib",
    "pyexpat": "xml", "elementtree": "xml", "asynchat": "asyncore", "smtpd": "asyncore",
}  # fmt: skip
# Importing these has no effect beyond loading them; those that are missing are passed over.
C_MODULES = (
    "_abc _asyncio _bisect _bz2 _codecs _collections _contextvars _csv _ctypes _datetime _decimal _elementtree "
    "_functools _hashlib _heapq _io _json _locale _lsprof _lzma _multiprocessing _operator _pickle _posixsubprocess "
    "_queue _random _signal _socket _sqlite3 _sre _ssl _stat _statistics _string _struct _symtable _thread "
    "_tracemalloc _uuid _warnings _weakref _zoneinfo array atexit binascii builtins cmath errno faulthandler fcntl "
    "gc grp itertools marshal math mmap posix pwd pyexpat resource select sys syslog termios time unicodedata zlib"
)
MIN_CHARACTERS = 80
TABLE_LINES = 50


class Document(NamedTuple):
    """A text, where it comes from, and the unit that decides its split."""

    unit: str
    source: str
    text: str


class _TextOnly(HTMLParser):
    """Gathers the text of a page, without scripts and styles."""

    def __init__(self) -> None:
        super().__init__()
        self.parts: list[str] = []
        self.hidden = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.hidden += tag in ("script", "style")

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in ("script", "style")

    def handle_data(self, data: str) -> None:
        if not self.hidden:
            self.parts.append(data)


def html_text(page: str) -> str:
    """The visible text of a page, runs of blank lines made one."""
    parser = _TextOnly()
    parser.feed(page)
    parser.close()
    lines = [line.rstrip() for line in "".join(parser.parts).split("\n")]
    kept = [line for line, before in zip(lines, ["", *lines], strict=False) if line or before]
    return "\n".join(kept).strip()


def unit_of(name: str) -> str:
    """The unit of a module name or relative path: `asyncio/tasks.py` -> asyncio, `_pydecimal.py` -> decimal."""
    top = name.split("/")[0].split(".")[0]
    bare = top.removeprefix("_py").removeprefix("_") or top
    return TWINS.get(bare, bare)


def _docstring_owners(tree: ast.Module) -> Iterator[ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            match node.body:
                case [ast.Expr(value=ast.Constant(value=str())), *_]:
                    yield node


def strip_docstrings(source: str, tree: ast.Module) -> str:
    """The source, whose tree is given, without its docstrings; comments and everything else stay as written.

    A docstring alone on its lines goes with them. Where it shares a line, or is a whole body, `pass` takes its place.

    Raises:
        SyntaxError: what is left does not parse (a docstring in parentheses, say).
    """
    lines = source.encode().split(b"\n")  # ast counts columns in UTF-8 bytes
    for node in sorted(_docstring_owners(tree), key=lambda owner: -owner.body[0].lineno):
        spot = node.body[0]
        first, last = spot.lineno - 1, spot.end_lineno or spot.lineno
        before, after = lines[first][: spot.col_offset], lines[last - 1][spot.end_col_offset :]
        alone = not before.strip() and not after.strip()
        needed = len(node.body) == 1 and not isinstance(node, ast.Module)
        lines[first:last] = [] if alone and not needed else [before + b"pass" + after]
    stripped = b"\n".join(lines).decode()
    ast.parse(stripped)
    return stripped


def docstrings(tree: ast.Module, module: str) -> list[tuple[str, str]]:
    """(qualified name, dedented docstring) of a module, its classes and functions, in the order of the file."""
    found: list[tuple[str, str]] = []

    texts: dict[ast.AST, str | None] = {owner: ast.get_docstring(owner) for owner in _docstring_owners(tree)}

    def visit(node: ast.AST, name: str) -> None:
        if isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            name = f"{name}.{node.name}"
        if text := texts.get(node):
            found.append((name, text))
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.stmt | ast.excepthandler):
                visit(child, name)

    visit(tree, module)
    return found


def mostly_table(tree: ast.Module, num_lines: int) -> bool:
    """Whether more than half of the lines are big literals at module level: generated data, not code."""
    table = 0
    for statement in tree.body:
        value = getattr(statement, "value", None)
        if isinstance(statement, ast.Assign | ast.AnnAssign) and isinstance(
            value, ast.Dict | ast.List | ast.Tuple | ast.Set | ast.Constant | ast.Call
        ):
            lines = (statement.end_lineno or 0) - statement.lineno + 1
            table += lines if lines > TABLE_LINES else 0
    return table > 0.5 * num_lines


def c_docstrings(module_name: str) -> list[tuple[str, str]]:
    """(qualified name, docstring) of a module written in C, names sorted; empty if it cannot be imported."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            module = import_module(module_name)
    except ImportError:
        return []
    found = [(module_name, module.__doc__)]
    for name, member in sorted(vars(module).items()):
        if inspect.isclass(member):
            found.append((f"{module_name}.{name}", vars(member).get("__doc__")))
            for inner, attribute in sorted(vars(member).items()):
                if inspect.isroutine(attribute) or inspect.isgetsetdescriptor(attribute):
                    found.append((f"{module_name}.{name}.{inner}", attribute.__doc__))
        elif inspect.isbuiltin(member):
            found.append((f"{module_name}.{name}", member.__doc__))
    return [(name, inspect.cleandoc(text)) for name, text in found if isinstance(text, str)]


def library_files(root: Path, suffixes: set[str]) -> list[tuple[str, Path]]:
    """(path relative to the library, path) of its files with these endings, sorted; tests and add-ons left out."""
    found = []
    for path in root.rglob("*"):
        parts = path.relative_to(root).parts
        if path.suffix not in suffixes or SKIPPED_FOLDERS.intersection(parts) or parts[0].startswith("config-"):
            continue
        if not path.name.startswith(SKIPPED_FILES) and path.is_file():
            found.append(("/".join(parts), path))
    return sorted(found)


class _Prose:
    """Gathers prose documents, each text once: the first place that has it keeps it."""

    def __init__(self) -> None:
        self.documents: list[Document] = []
        self.seen: set[str] = set()

    def new(self, text: str) -> bool:
        """Whether the text, white space aside, is here for the first time."""
        key = " ".join(text.split())
        fresh = bool(key) and key not in self.seen
        self.seen.add(key)
        return fresh

    def add_docstrings(self, unit: str, source: str, found: list[tuple[str, str]]) -> None:
        text = "\n\n".join(f"{name}\n\n{body.strip()}" for name, body in found if self.new(body))
        if len(text) >= MIN_CHARACTERS:
            self.documents.append(Document(unit, source, text))

    def add_text(self, unit: str, source: str, text: str) -> None:
        if len(text) >= MIN_CHARACTERS and self.new(text):
            self.documents.append(Document(unit, source, text.strip()))


def _read_source(path: Path) -> tuple[str, ast.Module] | None:
    """The text of a source file and its tree, or None where it does not decode or parse."""
    try:
        with tokenize.open(path) as file:
            text = file.read()
        return text, ast.parse(text)
    except (OSError, SyntaxError, ValueError):
        return None


def _reference_topics() -> dict[str, str]:
    """The language reference behind `help("if")`; empty where the installation leaves it out."""
    try:
        return dict(import_module("pydoc_data.topics").topics)
    except ImportError:
        return {}


def _source_documents(root: Path, prose: _Prose) -> Iterator[Document]:
    """The code documents; on the way the docstrings go to `prose`."""
    seen = set()
    for name, path in library_files(root, {".py"}):
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # old escapes in the library's own sources
            parsed = _read_source(path)
            if parsed is None:
                continue
            source, tree = parsed
            module = name.removesuffix(".py").removesuffix("/__init__").replace("/", ".")
            prose.add_docstrings(unit_of(name), module, docstrings(tree, module))
            if mostly_table(tree, source.count("\n") + 1):
                continue
            try:
                text = strip_docstrings(source, tree).strip("\n") + "\n"
            except SyntaxError:
                continue
        if len(text) >= MIN_CHARACTERS and text not in seen:
            seen.add(text)
            yield Document(unit_of(name), name, text)


def library_documents(root: Path | None = None) -> tuple[list[Document], list[Document]]:
    """The code and the prose documents of the standard library at `root` (that of this interpreter by default).

    Raises:
        UserError: there are no Python sources at `root`.
    """
    root = root or Path(sysconfig.get_paths()["stdlib"])
    prose = _Prose()
    code = list(_source_documents(root, prose))
    if not code:
        raise UserError(f"{root}: no Python sources of the standard library; install them or use another Python")
    for topic, text in sorted(_reference_topics().items()):
        prose.add_text("pydoc_data", f"pydoc_data.topics:{topic}", text)
    for name, path in library_files(root, {".txt", ".html", ".rst", ""}):
        if path.suffix or path.name.isupper():
            page = path.read_text(encoding="utf-8", errors="replace")
            prose.add_text(unit_of(name), name, html_text(page) if path.suffix == ".html" else page)
    for name in C_MODULES.split():
        prose.add_docstrings(unit_of(name), f"{name} (C)", c_docstrings(name))
    return code, prose.documents


def valid_units(domains: list[list[Document]], fraction: float, min_bytes: int) -> set[str]:
    """The units held out: in the order of a hash of their names, until every domain holds enough.

    Enough is the larger of `fraction` of the domain's bytes and `min_bytes`, but at most a quarter of it. Units larger
    than half of that are passed over, so that no single package is the validation set. The choice depends on no seed.
    """
    sizes = [Counter[str]() for _ in domains]
    for size, documents in zip(sizes, domains, strict=True):
        for document in documents:
            size[document.unit] += len(document.text.encode())
    goals = [min(max(fraction * size.total(), min_bytes), size.total() / 4) for size in sizes]
    chosen: set[str] = set()
    held = [0] * len(domains)
    names = {name for size in sizes for name in size}
    for name in sorted(names, key=lambda unit: hashlib.sha256(unit.encode()).digest()):
        if all(have >= goal for have, goal in zip(held, goals, strict=True)):
            break
        if all(size[name] <= goal / 2 for size, goal in zip(sizes, goals, strict=True)):
            chosen.add(name)
            held = [have + size[name] for have, size in zip(held, sizes, strict=True)]
    return chosen
