"""Docstrings leave the code whole, and nothing stands in two splits."""

import ast
import io
import json as json_module
import textwrap
import tokenize
from pathlib import Path

import pytest

from megabts.corpora.python_library import (
    Document,
    c_docstrings,
    docstrings,
    html_text,
    library_documents,
    library_files,
    mostly_table,
    strip_docstrings,
    unit_of,
    valid_units,
)
from megabts.errors import UserError

SAMPLE = textwrap.dedent(
    '''\
    #!/usr/bin/env python
    """Módulo: über ümlauts."""  # kept
    import os

    class Empty(Exception):
        """Only a docstring."""

    class Full:
        """Two
        lines."""

        value = 1  # comment

        def method(self):
            "One line."; x = 'é'; return x

        async def wait(self): "Nothing else."

    def outer():
        \'\'\'Outer.\'\'\'
        if True:
            def inner():
                r"""Inner \\d."""
                return """not a docstring"""
        return inner
    '''
)


def strip(source: str) -> str:
    return strip_docstrings(source, ast.parse(source))


def without_docstrings(source: str) -> str:
    """The oracle: the tree with each leading string expression dropped, or made `pass` in an empty body."""

    class Drop(ast.NodeTransformer):
        def generic_visit(self, node: ast.AST) -> ast.AST:
            super().generic_visit(node)
            match node:
                case ast.FunctionDef() | ast.AsyncFunctionDef() | ast.ClassDef() | ast.Module() if node.body:
                    if ast.get_docstring(node) is not None or isinstance(node.body[0], ast.Pass):
                        del node.body[0]
            return node

    return ast.dump(Drop().visit(ast.parse(source)))


def comments(source: str) -> list[str]:
    tokens = tokenize.generate_tokens(io.StringIO(source).readline)
    return [token.string for token in tokens if token.type == tokenize.COMMENT]


def test_strip_docstrings_on_every_shape():
    stripped = strip(SAMPLE)
    assert without_docstrings(stripped) == without_docstrings(SAMPLE)
    assert comments(stripped) == comments(SAMPLE)
    assert not any(word in stripped for word in ("ümlauts", "Only a", "Two", "One line", "Nothing", "Outer", "Inner"))
    assert '"""not a docstring"""' in stripped
    assert "class Empty(Exception):\n    pass\n" in stripped
    assert "pass; x = 'é'; return x" in stripped


@pytest.mark.parametrize(
    "source",
    [
        'def f():\n    (\n        """Doc."""\n    )\n    return 1\n',
        'def f(): \\\n    """Doc."""\n',
        'class A:\n    """Doc."""; \\\n    x = 1\n',
        'def f():\n    """Doc."""\n    # only a comment follows\n',
        '"""Doc."""\n',
    ],
)
def test_strip_docstrings_in_odd_places(source):
    stripped = strip(source)
    assert "Doc." not in stripped
    assert without_docstrings(stripped) == without_docstrings(source)


def test_what_does_not_parse_any_more_is_an_error():
    tree = ast.parse('def f():\n    """Doc."""\n    return 1\n')
    with pytest.raises(SyntaxError):
        strip_docstrings('def f():\n    """Doc."""\n    return (\n', tree)


def test_docstrings_come_in_order_with_qualified_names():
    found = docstrings(ast.parse(SAMPLE), "pkg.mod")
    names = ["", ".Empty", ".Full", ".Full.method", ".Full.wait", ".outer", ".outer.inner"]
    assert [name for name, _ in found] == ["pkg.mod" + name for name in names]
    assert dict(found)["pkg.mod.Full"] == "Two\nlines."


def test_tables_are_told_from_code():
    table = "TABLE = {\n" + "".join(f"    {n}: {n * n},\n" for n in range(200)) + "}\n"
    code = "".join(f"def f{n}():\n    return {n}\n" for n in range(200))
    assert mostly_table(ast.parse(table), table.count("\n"))
    assert not mostly_table(ast.parse(code + table), (code + table).count("\n"))


def test_html_text_drops_tags_scripts_and_double_blank_lines():
    page = "<html><style>p {}</style><p>One &amp; two</p>\n\n\n\n<script>var x;</script><p>three</p></html>"
    assert html_text(page) == "One & two\n\nthree"


def test_private_twins_share_a_unit():
    assert {unit_of(n) for n in ("decimal.py", "_decimal", "_pydecimal.py")} == {"decimal"}
    assert unit_of("asyncio/tasks.py") == unit_of("_asyncio") == "asyncio"
    assert unit_of("posixpath.py") == unit_of("ntpath.py") == unit_of("os.py") == "os"


def test_c_docstrings_are_those_that_python_shows():
    found = dict(c_docstrings("math"))
    assert "math.sqrt" in found
    assert "square root" in found["math.sqrt"]
    assert c_docstrings("no_such_module_anywhere") == []


def test_library_files_leave_out_tests_and_addons(tmp_path):
    wanted = ("a.py", "pkg/b.py")
    for name in (
        *wanted,
        "test/c.py",
        "pkg/tests/d.py",
        "site-packages/e.py",
        "config-3.11/f.py",
        "_sysconfigdata_x.py",
    ):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x = 1\n")
    assert [name for name, _ in library_files(tmp_path, {".py"})] == list(wanted)


def test_a_small_library_becomes_documents(tmp_path):
    body = "def run(value):\n    '''Run the value through the mill and back again, twice.'''\n    return value\n"
    good = '"""A module that has a long enough description of itself to be kept."""\n' + body * 3
    (tmp_path / "good.py").write_text(good)
    (tmp_path / "twin.py").write_text(good)
    (tmp_path / "broken.py").write_text("def (:\n")
    (tmp_path / "binary.py").write_bytes(b"\xff\xfe\x00x = 1\n")
    (tmp_path / "NOTES.txt").write_text(
        "Words about this library, in a file of their own, for people to read at ease. " * 2
    )
    code, prose = library_documents(tmp_path)
    assert [document.source for document in code] == ["good.py"]
    assert "'''" not in code[0].text
    sources = [document.source for document in prose]
    assert sources[0] == "good"
    assert "twin" not in sources
    assert "NOTES.txt" in sources
    assert prose[0].text.count("Run the value") == 1


def test_no_sources_is_one_clear_line(tmp_path):
    with pytest.raises(UserError, match="no Python sources of the standard library"):
        library_documents(tmp_path)


def test_valid_units_reach_the_goal_in_every_domain_without_giants():
    code = [Document(f"u{n}", f"u{n}.py", "c" * 100) for n in range(100)] + [Document("giant", "giant.py", "g" * 5000)]
    prose = [Document(f"u{n}", f"u{n}", "p" * 50) for n in range(0, 100, 2)]
    chosen = valid_units([code, prose], 0.1, 0)
    held = [sum(len(d.text) for d in domain if d.unit in chosen) for domain in (code, prose)]
    assert "giant" not in chosen
    assert held[0] >= 1500
    assert held[1] >= 250
    assert chosen == valid_units([code[::-1], prose[::-1]], 0.1, 0)


def test_real_library_sources_keep_their_meaning():
    for module in (ast, json_module, textwrap, tokenize):
        source = Path(module.__file__).read_text(encoding="utf-8")
        stripped = strip(source)
        assert len(stripped) < len(source)
        assert comments(stripped) == comments(source)
        assert without_docstrings(stripped) == without_docstrings(source)
