"""The commands and programs on README.md and the pages of docs/ run, in order, or say why they do not.

tests/pages/reduction.py has the rules by which they become small.
"""

import itertools
import os
import re
import shlex
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from tests.pages import reduction, stand_ins
from tests.pages.blocks import PAGES, ROOT, Block, indented, marks, read
from tests.weights import hub as hubs
from tests.xla_flags import xla_flags

HUB_NAMES = ("zhibinlan/LLaVE-0.5B",)
RUN = ("bash", "python")


def is_run(block: Block) -> bool:
    """Whether `test_blocks_run` runs a block. Training runs of docs/paper.md do in training/test_paper.py."""
    elsewhere = block.page.name == "paper.md" and re.search(
        r"llave_jax\.train\b|table3", block.text
    )
    return block.mark is None and block.language in RUN and not elsewhere


WITH_BLOCKS = [page for page in PAGES if any(map(is_run, read(page)))]
# Names that a program on a page expects to be there.
PREAMBLES = {
    "query @ target.T": "import jax\nquery = target = jax.nn.one_hot(range(4), 8)\n",
}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_block_is_run_or_says_why_not(page):
    blocks = read(page)
    for block in blocks:
        assert block.language in (*RUN, "json", ""), block
        if block.mark is not None:
            assert len(block.mark) > 10 or re.fullmatch(r"\[[\d, ]+\].*", block.mark), block
            assert reduction.reaches_outside(block.text), f"{block}: nothing here needs a mark"
        elif block.language in RUN:
            assert not reduction.reaches_outside(block.text), f"{block} cannot be run here"
    assert marks(page) == sum(block.mark is not None for block in blocks), "a mark without a block"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_stand_in_fences(page):
    """What is indented is output, a formula, or a form with words in capitals to be filled in."""
    for line in indented(page):
        is_command = re.match(r"(python|llave-\w+|pip|bash|sh|docker|gcloud) ", line)
        assert not is_command or re.search(r"\b[A-Z]{3,}\b", line), line


def test_shell_blocks_parse():
    """All of them, those that are not run too."""
    for block in (b for page in PAGES for b in read(page) if b.language == "bash"):
        checked = subprocess.run(["bash", "-n"], input=block.text, capture_output=True, text=True)
        assert not checked.stderr, f"{block}\n{checked.stderr}"


def test_loops_make_the_turns_that_are_needed():
    loop = "for id in 1 2 6; do\n  train --workdir runs/t-$id\n  train $id\ndone\n"
    assert "in 1; do" in reduction.reduce_loops(loop, "")
    assert "in 1 6; do" in reduction.reduce_loops(loop, "similarity runs/t-6 runs/t-22")
    together = "for i in 0 1; do\n  train $i &\ndone; wait\n"
    assert reduction.reduce_loops(together, "") == together


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """Of all blocks: one device, the reduced `python`, a hub of one's own."""
    folder = tmp_path_factory.mktemp("pages")
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    reduction.install(folder / "bin", set(project["optional-dependencies"]))
    files = hubs.files_of(stand_ins.hub_files(folder))
    with hubs.serve() as hub:
        for name in HUB_NAMES:
            hub.repo(name, files)
        given = {
            **os.environ,
            "PATH": f"{folder / 'bin'}:{os.environ['PATH']}",
            "PYTHONPATH": str(ROOT),
            "JAX_PLATFORMS": "cpu",
            "HF_ENDPOINT": hub.endpoint,
            "HF_HOME": str(folder / "hf"),
            "LLAVE_JAX_CACHE": str(folder / "cache"),
            "XLA_FLAGS": xla_flags(1),
        }
        for name in ("HF_HUB_OFFLINE", "HF_TOKEN"):
            given.pop(name, None)
        yield given


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("page", WITH_BLOCKS, ids=lambda page: page.name)
def test_blocks_run(page, environment, tmp_path):
    blocks = read(page)
    folder = tmp_path / "folder"
    stand_ins.make_folder(folder, blocks)
    source = page.read_text(encoding="utf-8").splitlines()
    for block in blocks:
        if not is_run(block):
            continue
        if block.language == "bash":
            later = "\n".join(source[block.line + block.text.count("\n") :])
            text = reduction.reduce_loops(block.text, later)
            command = ["bash", "-euo", "pipefail", "-c", text]
        else:
            text = "".join(v for k, v in PREAMBLES.items() if k in block.text) + block.text
            command = [sys.executable, "-c", text]
        start = time.perf_counter()
        done = subprocess.run(
            command,
            cwd=folder,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            timeout=600,
        )
        assert done.returncode == 0, f"{block}\n{text}\n{done.stdout[-4000:]}"
        assert "Traceback" not in done.stdout, f"{block}\n{text}\n{done.stdout[-4000:]}"
        print(f"{block}: {time.perf_counter() - start:.1f} s")
        for output in written(text):
            assert (folder / output).stat().st_size, f"{block} writes no {output}"


def written(text: str) -> list[Path]:
    """Where the commands of a bash block say that they write."""
    words = shlex.split(text.replace("\\\n", " "), comments=True)
    flags = ("--output", "--workdir")
    pairs = itertools.pairwise(words)
    return [Path(value) for flag, value in pairs if flag in flags and "$" not in value]
