"""Every code block of the documents runs, or is checked against what it speaks of.

The blocks of one document run in order, in one namespace and one new folder. By language:

- ``python``: run, with the stand-ins of `stand_ins.py`.
- ``output``: equals what the Python block before it printed.
- ``sh``: each command is run (``kvswap``, ``mkdir``, ``rm``) or checked against this repository
  (``make``, ``pip``, ``python``). Any other program fails: say here how it is checked.
- ``json``: parses.
- ``text``: not code.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.metadata
import io
import json
import re
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest

from kvswap.cli import main
from kvswap.predict import INDEXES, SELECTORS
from tests.docs import stand_ins
from tests.docs.blocks import DOCUMENTS, NAMES, ROOT, Block, blocks_of

LANGUAGES = ("json", "output", "python", "sh", "text")


class Reader:
    """Someone who does what a document says, from its first block to its last."""

    def __init__(self, folder: Path, model: Path) -> None:
        self.folder, self.model = folder, model
        self.namespace: dict[str, Any] = {"__name__": "__main__"}
        self.printed = ""

    def follow(self, block: Block) -> None:
        self.place = block.place
        getattr(self, f"_{block.language}")(block)

    def _text(self, block: Block) -> None:
        """Nothing to run."""

    def _json(self, block: Block) -> None:
        json.loads(block.source)

    def _python(self, block: Block) -> None:
        source = "\n" * (block.line - 1) + stand_ins.python(block.source, self.model)
        code = compile(source, str(block.path), "exec")  # tracebacks name the document's line
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(code, self.namespace)
        self.printed = out.getvalue()

    def _output(self, block: Block) -> None:
        assert block.source == self.printed, f"{self.place}: something else was printed"

    def _sh(self, block: Block) -> None:
        for line in block.source.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if not words:
                continue
            program = getattr(self, f"_sh_{Path(words[0]).name}", None)
            assert program is not None, f"{self.place}: how is {words[0]!r} to be checked?"
            program(words[1:])

    def _sh_kvswap(self, words: list[str]) -> None:
        with warnings.catch_warnings():
            code = main(stand_ins.command(words, self.model))
        assert code == 0, f"{self.place}: kvswap {' '.join(words)}: exit code {code}"

    def _sh_mkdir(self, words: list[str]) -> None:
        for path in self._inside(words):
            path.mkdir(parents=True, exist_ok=True)

    def _sh_rm(self, words: list[str]) -> None:
        for path in self._inside(words):
            shutil.rmtree(path)

    def _inside(self, words: list[str]) -> list[Path]:
        paths = [(self.folder / word).resolve() for word in words if not word.startswith("-")]
        for path in paths:
            assert path.is_relative_to(self.folder), f"{self.place}: leads out of the folder"
        return paths

    def _sh_make(self, words: list[str]) -> None:
        makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
        for word in words:
            name, is_setting, _ = word.partition("=")
            rule = rf"^{name} \?=" if is_setting else rf"^{name}:"
            known = re.search(rule, makefile, re.MULTILINE)
            assert known, f"{self.place}: the Makefile has no {name}"

    def _sh_pip(self, words: list[str]) -> None:
        assert words[0] == "install", f"{self.place}: how is pip {words[0]} to be checked?"
        known = importlib.metadata.metadata("kvswap").get_all("Provides-Extra") or []
        for word in words[1:]:
            found = re.fullmatch(r"(\.|kvswap)(\[(?P<extras>[\w,]+)\])?", word)
            assert found or word.startswith("-"), f"{self.place}: what is {word!r}?"
            extras = set(found["extras"].split(",")) if found and found["extras"] else set()
            assert extras <= set(known), f"{self.place}: no extra {extras - set(known)}"

    def _sh_python(self, words: list[str]) -> None:
        if words[0] == "-m":
            words = [f"{words[1].replace('.', '/')}/__main__.py", *words[2:]]
        if "--" in words:  # another command, to be run by this one
            words, within = words[: words.index("--")], words[words.index("--") + 1 :]
            getattr(self, f"_sh_{within[0]}")(within[1:])
        script = ROOT / words[0]
        assert script.is_file(), f"{self.place}: no {words[0]}"
        asked = {word.partition("=")[0] for word in words if word.startswith("--")}
        unknown = asked - _arguments_of(script)
        assert not unknown, f"{self.place}: {words[0]} has no {unknown}"


def _arguments_of(script: Path) -> set[str]:
    """Return the options that a script adds to its parser, without running it.

    Those that all benchmarks share are added by a module of the package.
    """
    sources = (script, ROOT / "src" / "kvswap" / "bench" / "script.py")
    trees = [ast.parse(source.read_text(encoding="utf-8")) for source in sources]
    calls = [node for tree in trees for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return {
        argument.value
        for call in calls
        if isinstance(call.func, ast.Attribute) and call.func.attr == "add_argument"
        for argument in call.args
        if isinstance(argument, ast.Constant)
    }


@pytest.fixture(scope="session")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return stand_ins.make_model(tmp_path_factory.mktemp("docs") / "model")


@pytest.fixture
def reader(tmp_path: Path, model: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    folder = (tmp_path / "folder").resolve()
    stand_ins.make_folder(folder)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    for registry in (SELECTORS, INDEXES):  # what a block registers goes with it
        monkeypatch.setattr(registry, "_classes", dict(registry._classes))
    monkeypatch.setattr(warnings, "showwarning", warnings.showwarning)
    return Reader(folder, model)


@pytest.mark.filterwarnings("ignore:.*has no O_DIRECT:RuntimeWarning")
@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_blocks_run(path: Path, reader: Reader) -> None:
    for block in blocks_of(path):
        reader.follow(block)


@pytest.mark.parametrize("path", DOCUMENTS, ids=NAMES)
def test_every_block_says_its_language(path: Path) -> None:
    for block in blocks_of(path):
        known = ", ".join(LANGUAGES)
        assert block.language in LANGUAGES, f"{block.place}: must be one of {known}"


@pytest.mark.parametrize(
    ("language", "source"),
    [
        ("python", "assert 1 == 2\n"),
        ("output", "what nobody printed\n"),
        ("sh", "make dinner\n"),
        ("sh", "make demo DINNER=1\n"),
        ("sh", 'pip install ".[dinner]"\n'),
        ("sh", "kvswap dinner\n"),
        ("sh", "kvswap run --model Qwen/Qwen3-0.6B\n"),
        ("sh", "python benchmarks/dinner.py\n"),
        ("sh", "python benchmarks/train_reader.py --dinner 1\n"),
        ("sh", "rm -r ../model\n"),
        ("sh", "dinner\n"),
    ],
)
def test_a_block_that_is_wrong_fails(language: str, source: str, reader: Reader) -> None:
    with pytest.raises(AssertionError):
        reader.follow(Block(ROOT / "README.md", 1, language, source))
