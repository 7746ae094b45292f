"""Rows that a run skips: what all processes skip together, and a whole run over the hub's rows."""

import json
import os
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet
import pytest

from llave_jax import train
from llave_jax.data.rows import EMPTY_SIDE
from llave_jax.data.skips import TooManySkips
from llave_jax.digits.tokenizer import build_tokenizer
from llave_jax.training import skipped_rows
from tests.data.mmeb_tree import make_tree
from tests.data.test_sources import row, train_on, write_rows
from tests.training.test_processes import free_port
from tests.xla_flags import xla_flags


@pytest.fixture
def job(monkeypatch):
    """`job([arguments of each process])`: what each of them raised, or None."""

    def run(arguments):
        barrier, offers = threading.Barrier(len(arguments), timeout=60), {}
        number = threading.local()

        def allgather(array):
            offers[number.value] = array
            barrier.wait()
            gathered = np.stack([offers[i] for i in range(len(arguments))])
            barrier.wait()
            return gathered

        def process(i):
            number.value = i
            try:
                skipped_rows.check_skipped_rows(*arguments[i])
            except TooManySkips as error:
                return str(error)

        monkeypatch.setattr(skipped_rows.multihost_utils, "process_allgather", allgather)
        with ThreadPoolExecutor(len(arguments)) as pool:
            return list(pool.map(process, range(len(arguments))))

    return run


def test_processes_stop_together_for_what_they_skip_together(job):
    subsets, workdir = ["b", "a"], Path("run")
    skipped = [("a:1", "b:7"), (), ("b:1", "b:7", "b:2")]

    def run(limit):
        return job([(ids, subsets, limit, workdir) for ids in skipped])

    # b:7 was skipped by two processes, in different epochs: 4 rows.
    assert run(limit=4) == [None] * 3
    first, *others = run(limit=3)
    assert others == [first] * 2
    assert "4 rows could not be used, more than the 3 allowed: b 3, a 1." in first
    assert "listed in run/skipped_*.jsonl" in first


@pytest.mark.slow
def test_a_run_over_the_hubs_rows_says_what_it_skipped(tmp_path, caplog):
    """WebQA's markers without an image and empty sides, with the default policy: raise."""
    make_tree(tmp_path / "tree", 8)
    for subset, change in (("WebQA", {"pos_text": "", "pos_image_path": None}), ("CIRR", {})):
        path = tmp_path / f"tree/{subset}/original-00000-of-00002.parquet"
        rows = pyarrow.parquet.read_table(path).to_pylist()
        rows[2] |= change or {"qry": " ", "qry_image_path": ""}
        pyarrow.parquet.write_table(pa.Table.from_pylist(rows), path)
    caplog.set_level("INFO")
    ids, losses = train_on(tmp_path / "run", tmp_path / "tree")
    assert np.isfinite(losses).all()
    assert any(name.startswith("WebQA") for step in ids for name in np.ravel(step))
    assert f"skipped 2 rows: {EMPTY_SIDE} (CIRR 1, WebQA 1)" in caplog.text
    lines = (tmp_path / "run/skipped_0.jsonl").read_text().splitlines()
    entries = [json.loads(line) for line in lines]
    assert [(e["subset"], e["row"]) for e in entries] == [("CIRR", 2), ("WebQA", 2)]


CONFIG = """
from configs.quickstart import get_config as quickstart


def get_config():
    config = quickstart()
    config.model.tokenizer = {tokenizer!r}
    config.data.path = {data!r}
    config.data.on_error = "skip"
    config.data.max_skip_share = 0.15
    config.batch.pairs = 8
    config.steps = 30
    config.log_every = 1
    config.eval.benchmark = None
    return config
"""


@pytest.mark.slow
def test_two_processes_stop_at_the_same_step(tmp_path):
    """Of 40 rows 8 are broken and 6 may be; each process meets 4 of them, or a few more or less."""
    rows = [row(qry=f"question {n}", pos_image_path="" if n % 5 else "gone.png") for n in range(40)]
    data = write_rows(tmp_path / "Mine.json", rows)
    tokenizer = build_tokenizer(tmp_path / "tokenizer")
    config = tmp_path / "config.py"
    config.write_text(CONFIG.format(data=str(data), tokenizer=str(tokenizer)))
    command = [sys.executable, "-m", "llave_jax.train", f"--config={config}"]
    command += [f"--workdir={tmp_path / 'run'}", f"--coordinator=127.0.0.1:{free_port()}"]
    command += ["--num_processes=2", "--process_id"]
    flags = xla_flags(1)
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "XLA_FLAGS": flags}
    processes = [
        subprocess.Popen(
            [*command, str(i)],
            cwd=Path(train.__file__).parents[1],
            env=environment,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(2)
    ]
    errors = [process.communicate(timeout=500)[1] for process in processes]
    message = "rows could not be used, more than the 6 allowed: Mine "
    assert all(message in error for error in errors), errors
    said = [error.partition(message)[2].splitlines()[0] for error in errors]
    assert said[0] == said[1]
    assert all(process.returncode for process in processes)
