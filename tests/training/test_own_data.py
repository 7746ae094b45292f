"""The README's command for data of one's own: from 200 pairs in files, some of them broken, to a better recall."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import PIL.Image
import pytest
from sklearn.datasets import load_digits

from llave_jax.data.sources import open_source, split_held_out
from llave_jax.parallel import sharding
from llave_jax.training.metrics import read_metrics
from llave_jax.weights import model_dir
from tests.xla_flags import xla_flags

ROOT = Path(__file__).parents[2]
# What the command names, below the folder in which it is run.
MODEL, DATA, RUN = "models/llave-0.5b", "data/pairs.json", "runs/mine"
PAPERS = {
    "white": (255, 255, 255), "red": (230, 30, 30), "green": (30, 180, 40), "blue": (30, 60, 230),
    "yellow": (240, 230, 30), "pink": (250, 150, 190), "grey": (128, 128, 128), "brown": (120, 70, 20),
    "orange": (250, 140, 10), "purple": (140, 30, 160),
}  # fmt: skip
MISSING, TRUNCATED, EMPTY = (11, 50), (20, 70), (30, 90)


def readme_command():
    """The last command of "Train on your own data", as it is printed."""
    section = (ROOT / "README.md").read_text().split("## Train on your own data")[1]
    block = next(b for b in re.findall(r"```bash\n(.*?)```", section, re.S) if "train" in b)
    command = shlex.split(block.replace("\\\n", " ").splitlines()[-1])
    assert command[:3] == ["python", "-m", "llave_jax.train"]
    return command[1:]


def write_pairs(folder):
    """200 scans of digits on coloured paper, each with a caption; some rows are broken."""
    (folder / "images").mkdir(parents=True)
    rows = []
    for i, scan in enumerate(load_digits().images[:200]):
        name, colour = list(PAPERS.items())[i % len(PAPERS)]
        paper = np.uint8((1 - scan / 16)[..., None] * colour)
        PIL.Image.fromarray(paper).resize((96, 96)).save(folder / f"images/{i:04}.png")
        row = dict.fromkeys(("pos_image_path", "neg_text", "neg_image_path"), "")
        row["qry"] = "<|image_1|>\nFind an image caption describing the given everyday image."
        row["qry_image_path"] = f"images/{i:04}.png"
        row["pos_text"] = f"A digit on {name} paper."
        rows.append(row)
    for i in MISSING:
        rows[i]["qry_image_path"] = f"images/no_{i:04}.png"
    for i in TRUNCATED:
        path = folder / f"images/{i:04}.png"
        path.write_bytes(path.read_bytes()[:120])
    for i in EMPTY:
        rows[i]["pos_text"] = ""
    (folder / "pairs.json").write_text(json.dumps(rows))


def write_model(directory, golden_model, scale=64):
    """The converted tiny model in weights that the command's learning rate moves.

    Adam moves a weight by the learning rate, whatever the weight's size, and the command's is that of models of
    width 896 and more. Here the weights of the language model are smaller by `scale` and the norms in front
    of them larger, which is the same function; so are what is added to the residual stream, which is
    normalised before it is read.
    """
    added = ("embed_tokens/embedding", "o_proj/kernel", "down_proj/kernel")
    params = sharding.flatten(golden_model.params)
    for path, value in params.items():
        if path.startswith("language_model/layers") and path.endswith("layernorm/scale"):
            params[path] = value * scale
        elif (
            path.startswith(("projector/linear_2", "image_newline"))
            or path.endswith(added)
            or (path.startswith("language_model/layers") and path.endswith("kernel"))
        ):
            params[path] = value / scale
    tokenizer = golden_model.directory / model_dir.TOKENIZER
    params = sharding.unflatten(params)
    model_dir.write_model_dir(directory, golden_model.config, params, tokenizer=tokenizer)


@pytest.mark.slow
def test_the_readmes_command_gets_a_better_recall(golden_model, tmp_path):
    """On 8 devices; test_pages.py runs the README's commands on one."""
    write_pairs(tmp_path / "data")
    write_model(tmp_path / MODEL, golden_model)
    (tmp_path / "configs").symlink_to(ROOT / "configs")
    environment = {
        **os.environ,
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": xla_flags(8),
        "PYTHONPATH": str(ROOT),
    }
    done = subprocess.run(
        [sys.executable, *readme_command()],
        env=environment,
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-4000:]

    # Rows that are held out are not trained on, and not listed.
    source, _ = split_held_out(open_source(tmp_path / DATA), 0.1)
    trained_on = {source.pair_id(i) for i in range(len(source))}
    broken = {f"pairs:{i}" for i in (*MISSING, *TRUNCATED, *EMPTY)}
    lines = (tmp_path / RUN / "skipped_0.jsonl").read_text().splitlines()
    listed = {"{subset}:{row}".format(**json.loads(line)) for line in lines}
    assert listed == broken & trained_on
    assert len(listed) >= 4
    assert f"skipped {len(listed)} rows that cannot be used" in done.stdout

    scored = [line for line in read_metrics(tmp_path / RUN) if "validation/recall@1" in line]
    before, after = (line["validation/recall@1"] for line in (scored[0], scored[-1]))
    assert before < 0.5 < after
    assert f"trained (step {scored[-1]['step']})" in done.stdout
