"""The pages are true of the tree: every path, name, config field and command line on them exists.

Not CHANGELOG.md, which also names what was. That the commands run is tested in test_pages.py; docs/paper.md has tests of its own.
"""

import fnmatch
import functools
import importlib
import importlib.util
import itertools
import json
import re
import shlex
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
from ml_collections import ConfigDict

from llave_jax.config import default_config
from tests.pages import blocks

ROOT = Path(__file__).parents[1]
PAGES = [*blocks.PAGES, ROOT / "CONTRIBUTING.md"]
# A Python file, with or without its folders.
FILE = re.compile(r"(?<![\w/.<-])[\w/]+\.py\b")
TREE = ("llave_jax", "tests", "tools", "configs", "benchmarks", "docs", "launch", ".ci")

# Runs each program given on the command line with --help, forked from one process that has imported what
# all of them need, and prints {program: what it said}.
HELP = """
import json, os, re, runpy, sys, tempfile, traceback
import absl.flags, flax.linen, grain.python, jax, matplotlib.pyplot, ml_collections, optax
import orbax.checkpoint, pyarrow.parquet, sklearn.metrics, tensorboardX, transformers
import llave_jax.embedding.embedder, llave_jax.evaluation.run, llave_jax.training.setup
said = {}

def ask(program, *flags):
    with tempfile.TemporaryFile("w+") as output:
        child = os.fork()
        if child == 0:
            os.dup2(output.fileno(), 1)
            os.dup2(output.fileno(), 2)
            sys.argv = [program, *flags]
            sys.path.insert(0, os.path.dirname(program) or os.getcwd())
            try:
                if program.endswith(".py"):
                    runpy.run_path(program, run_name="__main__")
                else:
                    runpy.run_module(program, run_name="__main__", alter_sys=True)
            except SystemExit:
                pass
            except BaseException:
                traceback.print_exc()
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(0)
        os.waitpid(child, 0)
        output.seek(0)
        return output.read()

for program in sys.argv[1:]:
    said[program] = ask(program, "--help")
    if "COMMAND" in said[program]:  # each of a program's commands has flags of its own
        for command in re.findall(r"^    (\\w+) ", said[program], flags=re.M):
            said[program] += ask(program, command, "--help")
    if "--helpfull" in said[program]:  # absl's short help has the flags of the program's own file only
        said[program] = ask(program, "--helpfull")
print(json.dumps(said))
"""


def text_of(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def code_of(page: Path) -> list[str]:
    """Inline code, fenced blocks and indented blocks, continued lines joined."""
    fenced = [block.text.replace("\\\n", " ") for block in blocks.read(page)]
    text = blocks.without(page).replace("\\\n", " ")
    indented = re.findall(r"^(?: {4}.*\n?)+", text, flags=re.M)
    return [*fenced, *indented, *re.findall(r"`([^`\n]+)`", text)]


@functools.cache
def files() -> tuple[str, ...]:
    """Every file and folder of the tree, relative to its root."""
    found = [p for top in TREE for p in (ROOT / top).rglob("*") if "__pycache__" not in p.parts]
    found += [p for p in ROOT.iterdir() if p.is_file()] + [ROOT / top for top in TREE]
    return tuple(p.relative_to(ROOT).as_posix() for p in found)


def exists(name: str) -> bool:
    """A path of the tree, a pattern of some, or the end of one (`ops/rope.py`, `rope.py`)."""
    name = name.rstrip("/")
    return any(fnmatch.fnmatch(path, name) or path.endswith(f"/{name}") for path in files())


def anchors(page: Path) -> set[str]:
    headings = re.findall(r"^#+ (.*)$", text_of(page), flags=re.M)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of each command line on a page; a program is a module or a file."""
    found = []
    for code in code_of(page):
        for line in re.findall(r"(?:^|[\s;&(])python (-m .+|\S+\.py\b.*)", code):
            words = shlex.split(
                re.split(r"\s(?:&|&&|;|\|)(?:\s|$)|\s {4,}|; ", line)[0], comments=True
            )
            if words[:1] == ["-m"] and words[1].startswith("llave_jax"):
                found.append((words[1], words[2:]))
            elif words and words[0].endswith(".py"):
                found.append((words[0], words[1:]))
        found += [
            (scripts()[words[0]], words[1:])
            for words in map(str.split, code.splitlines())
            if len(words) > 1 and words[0] in scripts()
        ]
    return found


@functools.cache
def scripts() -> dict[str, str]:
    """Console script -> its module."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    return {name: target.split(":")[0] for name, target in project.get("scripts", {}).items()}


@functools.cache
def help_of() -> dict[str, str]:
    """What each program on the pages says when asked for help."""
    programs = sorted({program for page in PAGES for program, _ in commands(page)})
    command = [sys.executable, "-c", HELP, *programs]
    said = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    return json.loads(said.splitlines()[-1])


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_paths_exist(page):
    """Paths of the tree, names of Python files, and the targets of links."""
    named = {
        path.rstrip(".")
        for code in code_of(page)
        for path in re.findall(rf"(?<![\w/.-])(?:{'|'.join(map(re.escape, TREE))})/[\w./*-]*", code)
    }
    if page.name == "architecture.md":
        named |= {n for image in page.parent.glob("*.svg") for n in FILE.findall(text_of(image))}
    named |= {name for code in code_of(page) for name in FILE.findall(code)}
    # NAME stands for a name of the reader's choice.
    missing = {path for path in named if not re.search(r"[A-Z]{4}", path) and not exists(path)}
    for target in re.findall(r"\]\(([^)\s]+)\)", text_of(page)):
        if "://" not in target:
            path, _, anchor = target.partition("#")
            linked = (page.parent / path).resolve() if path else page
            if not linked.exists() or (anchor and anchor not in anchors(linked)):
                missing.add(target)
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_names_of_the_package_exist(page):
    """`llave_jax.room.module.name` is a module, or something that a module has."""
    names = {n for code in code_of(page) for n in re.findall(r"\bllave_jax(?:\.\w+)+", code)}
    for name in sorted(names):
        parts = name.split(".")
        target = importlib.import_module("llave_jax")
        for number, part in enumerate(parts[1:], start=2):
            try:
                target = getattr(target, part)
            except AttributeError:
                module = ".".join(parts[:number])
                # A module that needs an extra is there, if not to be imported.
                assert importlib.util.find_spec(module) is not None, name
                try:
                    target = importlib.import_module(module)
                except ImportError:
                    break


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_have_the_names_given_with_them(page):
    """In "`inputs/batch.py` (`Budget`)" or "`KINDS` in `cross_device.py`" the file has such a name."""
    text = text_of(page)
    pairs = re.findall(r"`([\w/]+\.py)` \(`([\w.]+)`", text)
    pairs += [pair[::-1] for pair in re.findall(r"`(\w+)`[^`|]{0,30}? in\s`([\w/]+\.py)`", text)]
    for file, name in pairs:
        found = [path for path in files() if path.endswith(file)]
        assert any(re.search(rf"\b{name}\b", text_of(ROOT / path)) for path in found), (file, name)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_config_fields_exist(page):
    """`config.loss.alpha` or `loss.alpha` is a field of a run's configuration."""
    config = default_config()
    sections = [key for key, value in config.items() if isinstance(value, ConfigDict)]
    missing = set()
    for code in code_of(page):
        named = re.findall(r"(?:--|\b)config\.(\w[\w.]*\w)", code)
        named += re.findall(rf"^(?:{'|'.join(sections)})(?:\.\w+)+$", code)
        for field in named:
            value = config
            for key in field.split("."):
                # A file's name, as config.py and data.html.
                if key in ("py", "json", "html"):
                    break
                if not isinstance(value, ConfigDict) or key not in value:
                    missing.add(field)
                    break
                value = value[key]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_parse(page):
    """Each program answers --help, and each of its flags on the page is there."""
    for program, arguments in commands(page):
        said = help_of()[program].replace("--[no]", "--")
        if "pip install 'llave_jax[" in said:
            continue
        assert "usage" in said.lower() or "flags" in said.lower(), f"{program}: {said}"
        for flag in (word.partition("=")[0] for word in arguments if word.startswith("--")):
            if not flag.startswith("--config."):
                assert re.search(rf"{flag}\b", said), f"{program} has no {flag}"
            # What follows --config is a file or the short name of one.
        for flag, value in itertools.pairwise(arguments):
            if flag == "--config" and not re.search(r"[A-Z]{4}|[$]", value):
                name = value.partition(":")[0]
                assert exists(name) or exists(f"configs/{name}.py"), value


def test_comments_name_files_that_exist():
    for path in (
        p for top in TREE for p in (ROOT / top).rglob("*.py") if "__pycache__" not in p.parts
    ):
        named = re.findall(r"`([\w/]+\.py)`", text_of(path))
        named += re.findall(
            rf"(?<![\w/.])(?:{'|'.join(TREE[:-1])})/[\w/]+\.(?:py|md)\b", text_of(path)
        )
        missing = {name for name in named if not re.search(r"[A-Z]{4}", name) and not exists(name)}
        assert not missing or path.is_relative_to(ROOT / "tests"), path


def test_letters_of_shapes_are_those_of_the_glossary():
    page = text_of(ROOT / "docs/architecture.md")
    letters = re.findall(r"^\| ([A-Z]) \|", page, flags=re.M)
    assert len(letters) == len(set(letters)) > 20
    for path in (ROOT / "llave_jax").rglob("*.py"):
        shapes = re.findall(
            r'\b(?:Float|Int|UInt8|Bool|Num|Shaped)\w*\[[^\]"]*"([^"]*)"\]', text_of(path)
        )
        used = {word.upper() for shape in shapes for word in re.findall(r"\b[A-Za-z]\b", shape)}
        assert used <= set(letters), path


def test_make_targets_exist():
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), flags=re.M))
    for page in PAGES:
        for code in code_of(page):
            for target in re.findall(r"^\s*make ([\w-]+)", code, flags=re.M):
                assert target in targets, f"{page.name}: make {target}"
