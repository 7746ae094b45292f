"""docs/paper.md: its commands are ones, its numbers the published ones; Table 3 trains in small."""

import functools
import importlib
import re
import subprocess
from pathlib import Path

import jax
import numpy as np
import pytest

from llave_jax import convert, train
from llave_jax.evaluation import published
from llave_jax.models.llave import Llave, abstract_params
from llave_jax.parallel import sharding
from llave_jax.training import batch_shape, optim, setup
from llave_jax.training.metrics import read_metrics
from llave_jax.weights import model_dir
from tests.pages.blocks import read

# ml_collections loads config files in a way that Python 3.12 does away with.
pytestmark = pytest.mark.filterwarnings("ignore:the load_module:DeprecationWarning")

ROOT = Path(__file__).parents[2]
PATH = ROOT / "docs/paper.md"
PAGE = PATH.read_text(encoding="utf-8")
PLAIN = ROOT / "configs/llave_2b.py"


def commands():
    """The arguments of every `python` on the page, loops unrolled by the shell itself."""
    stand_in = "python() { printf '%s\\037' \"$@\"; echo; }\n"
    script = stand_in + "".join(b.text for b in read(PATH) if b.language == "bash")
    output = subprocess.run(
        ["bash", "-euc", script], cwd=ROOT, capture_output=True, text=True, check=True
    ).stdout
    return [line.split("\037")[:-1] for line in output.splitlines()]


COMMANDS = commands()
TRAINING = [c[2:] for c in COMMANDS if c[:2] == ["-m", "llave_jax.train"]]
OTHERS = [c for c in COMMANDS if c[:2] != ["-m", "llave_jax.train"]]


def parse_training(arguments):
    """The config and the workdir that the trainer would see."""
    args = train.parse_args(arguments)
    return args.config, str(args.workdir)


def parse(command):
    """The flags that a program makes of its arguments."""
    if command[0] == "-m":
        return importlib.import_module(command[1]).parse_args(command[2:])
    if command[0] == "tools/convert_hf.py":
        return convert.parse_args(command[1:])
    return importlib.import_module(f"tools.{Path(command[0]).stem}").parse_args(command[1:])


def test_the_page_has_a_command_for_everything():
    programs = {c[1] if c[0] == "-m" else c[0] for c in COMMANDS}
    assert programs == {
        "llave_jax.train",
        "llave_jax.evaluate",
        "llave_jax.similarity",
        "tools/convert_hf.py",
        "tools/prepare_data.py",
        "tools/check_example.py",
    }
    workdirs = [parse_training(c)[1] for c in TRAINING]
    assert len(set(workdirs)) == len(workdirs) == 3 + 8 + 2 * 5 + 3 + 7
    for number in range(1, 8):
        assert f"Figure {number}" in PAGE or number in (3, 4)
        assert number == 7 or re.search(rf"Tables?\b.*\b{number}\b", PAGE)


@functools.cache
def paths_of(llave):
    return list(sharding.flatten(abstract_params(Llave(llave))))


@pytest.mark.parametrize("arguments", TRAINING, ids=lambda a: a[3])
def test_training_commands_make_a_run(arguments):
    config, workdir = parse_training(arguments)
    assert Path(workdir).parent.name == "runs"
    assert batch_shape.total_steps(config, 662_178) > 0
    assert batch_shape.pairs_per_group(config, shards=8) > 0
    preset = config.model.preset
    assert config.model.path.startswith("models/")
    config.model.path = None
    llave = setup.model_config(config)
    multipliers = optim.lr_multipliers(paths_of(llave), config.optim.rates)
    assert any(value is None for value in multipliers.values()) != (
        config.optim.rates[0][0] == ".*"
    )
    assert {"0.5b": 896, "2b": 1536, "7b": 3584}[preset[6:]] == llave.text.hidden_size


@pytest.mark.parametrize("command", OTHERS, ids=lambda c: " ".join(c)[:60])
def test_other_commands_are_understood(command):
    arguments = parse(command)
    # What is evaluated or converted was made further up on the page.
    made = {"hub", "models", "data", "results"}
    for name in ("model", "input"):
        if hasattr(arguments, name):
            path = str(getattr(arguments, name))
            assert path.split("/")[0] in made or path in {parse_training(c)[1] for c in TRAINING}
    if command[0] == "-m" and command[1] == "llave_jax.similarity":
        outputs = {c[c.index("--output") + 1] for c in OTHERS if "--output" in c}
        assert {entry.split("=")[1] for entry in arguments.evaluations} <= outputs


def table_rows():
    return [
        [cell.strip() for cell in line.strip("|").split("|")]
        for line in PAGE.splitlines()
        if line.startswith("| ")
    ]


def test_numbers_are_the_published_ones():
    rows = table_rows()
    for row in published.MMEB:
        if row.model.startswith("LLaVE"):
            values = [row.classification, row.vqa, row.retrieval, row.grounding]
            values += [row.ind, row.ood, row.overall]
            assert [row.model, *map(str, values)] in rows
    ablations = {row[0]: row[4:] for row in rows if row[0] in map(str, range(1, 9))}
    assert len(ablations) == 8
    for number, values in ablations.items():
        row = published.ABLATIONS.get(int(number))
        assert values == (
            ["-"] * 3 if row is None else [str(row.ind), str(row.ood), str(row.overall)]
        )
    for dataset, by_loss in published.SIMILARITY.items():
        cells = [" / ".join(f"{mean:.2f}" for mean in by_loss[k]) for k in ("InfoNCE", "LLaVE")]
        assert [dataset, *cells] in rows
    for name, title in (("msrvtt", "MSR-VTT"), ("msvd", "MSVD")):
        recalls = "/".join(map(str, published.LLAVE_7B_VIDEO[name]))
        assert f"{title} {recalls}" in PAGE


def ablation(number):
    return parse_training(["--config", f"{ROOT}/configs/ablations.py:{number}", "--workdir", "w"])[
        0
    ]


def test_ablations_change_one_thing_after_the_other(capsys):
    plain = parse_training(["--config", str(PLAIN), "--workdir", "w"])[0]
    frozen, projector = (("vision_tower/.*", None),), (("projector/.*", None),)
    rest = ((".*", 1.0),)
    expected = {
        1: ("hardness", 0, "device", 50_000, rest),
        2: ("hardness", 0, "device", 50_000, frozen + rest),
        3: ("hardness", 0, "device", 50_000, frozen + projector + rest),
        4: ("hardness", 0, "device", 20_000, frozen + rest),
        5: ("hardness", 0, "device", 100_000, frozen + rest),
        6: ("hardness", 0, "micro", 50_000, frozen + rest),
        7: ("focal", 0, "micro", 50_000, frozen + rest),
        8: ("hardness", 9, "micro", 50_000, frozen + rest),
    }
    for number, (kind, alpha, pool, rows, rates) in expected.items():
        config = ablation(number)
        assert (config.loss.kind, config.loss.alpha, config.loss.pool) == (kind, alpha, pool)
        assert (config.data.max_rows, config.optim.rates) == (rows, rates)
        config.loss, config.optim.rates = plain.loss, plain.optim.rates
        config.data.max_rows = plain.data.max_rows
        assert config == plain
    with pytest.raises(SystemExit):
        ablation(9)
    assert "ablations.py:9: expected one of 1, 2" in capsys.readouterr().err


def test_pools_of_the_ablations_on_eight_devices():
    assert batch_shape.pairs_per_group(ablation(2), shards=8) == 4
    config = ablation(2)
    config.batch.micro_batches = 64 // 2
    assert batch_shape.pairs_per_group(config, shards=2) == 4
    config.batch.micro_batches = 32
    with pytest.raises(ValueError, match=r"loss\.pool is 'device'.*pools of 1 pair.*nothing to"):
        batch_shape.pairs_per_group(config, shards=8)


def small(arguments):
    """A command's config with a tiny model and the digits: 2 micro-batches of 8 x 4 pairs."""
    config, _ = parse_training(arguments)
    config.model.path, config.model.preset, config.model.tokenizer = None, "tiny", "digits"
    config.data.path, config.data.num_workers = "digits", 0
    micro_batches = min(2, config.batch.micro_batches)
    config.update_from_flattened_dict(
        {
            "batch.pairs": 32 * micro_batches,
            "batch.micro_batches": micro_batches,
            "batch.row_length": 512,
            "batch.tokens_per_pair": 128.0,
            "batch.crops_per_pair": 8.0,
            "model.inputs.max_length": 512,
            "model.inputs.max_text_length": 512,
            "dtype": "float32",
            "steps": 2,
            "optim.learning_rate": 1e-3,
            "log_every": 1,
        }
    )
    return config


def by_workdir(*names):
    return [next(c for c in TRAINING if c[3] == f"runs/{name}") for name in names]


@pytest.fixture(scope="module")
def trained(few_digits, tmp_path_factory):
    """(losses, initial parameters, parameters) of a run, by the name of its workdir; made once."""
    digits_root = tmp_path_factory.mktemp("digits")
    done = {}

    def run(name):
        if name not in done:
            config = small(by_workdir(name)[0])
            workdir = tmp_path_factory.mktemp(name)
            setup.locate_data(config, digits_root)
            (workdir / "digits").symlink_to(digits_root / "digits")
            train.train(config, workdir)
            losses = [line["loss"] for line in read_metrics(workdir) if "loss" in line]
            after = sharding.flatten(jax.tree.map(np.asarray, model_dir.load_params(workdir)))
            done[name] = losses, after
        return done[name]

    return run


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_table_3_in_small(trained):
    losses = {number: trained(f"table3-{number}")[0] for number in range(1, 9)}
    first = {number: values[0] for number, values in losses.items()}
    assert all(np.isfinite(values).all() and len(values) == 2 for values in losses.values())
    # What is frozen, and how many of 20 000 rows there are, does not enter the first loss.
    for number in (1, 3, 4, 5):
        assert first[number] == pytest.approx(first[2], rel=1e-4)
    # More negatives cost more, and weights above 1 more again: an untrained model's cosines are positive.
    assert first[2] < first[6] < first[8]
    assert first[7] not in (first[6], first[8])

    def moved(number, part):
        values, others = trained(f"table3-{number}")[1], trained("table3-3")[1]
        return any(
            not np.array_equal(values[path], others[path])
            for path in values
            if path.startswith(part)
        )

    # ID 3 leaves tower and projector as they were: the same seed made all of them.
    for number in range(1, 9):
        assert moved(number, "vision_tower/") == (number == 1)
        assert moved(number, "projector/") == (number != 3)
        assert number == 3 or moved(number, "language_model/")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_figures_in_small(trained):
    def config(name):
        return small(by_workdir(name)[0])

    # The same settings are on the page under two names: one run of them is enough.
    assert config("alpha-9") == config("batch-64") == config("table3-8")
    assert config("alpha-0") == config("table3-6")
    eight = trained("table3-8")[0]
    assert trained("epochs-2")[0][0] == pytest.approx(eight[0], rel=1e-5)
    # A pool of 64 instead of two of 32.
    assert trained("pool-64")[0][0] > eight[0]
