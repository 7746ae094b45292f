"""What all commands share, as their users see it: spelling of flags, names of configs, one line of error."""

import argparse
import importlib
import logging
import os
import re
import shutil
import subprocess
import sys
import tomllib
import venv
import zipfile
from pathlib import Path

import pytest

from llave_jax.common import command_line

ROOT = Path(__file__).parents[2]
COMMANDS = ("train", "evaluate", "embed", "convert", "similarity", "inspect_data")


def parser(**options):
    found = command_line.Parser("llave_jax.example", "An example.", **options)
    found.add_argument("--batch-size", type=int)
    found.add_argument("--output")
    return found


@pytest.mark.parametrize(
    "arguments", [["--batch-size", "8"], ["--batch_size", "8"], ["--batch_size=8"]]
)
def test_flags_have_dashes_or_underscores(arguments):
    assert parser().parse_args([*arguments, "--output", "a_b"]).batch_size == 8
    assert parser().parse_args(["--output=--a_b"]).output == "--a_b"


@pytest.mark.parametrize("name", COMMANDS)
def test_every_flag_is_spelled_with_dashes(name, capsys):
    module = importlib.import_module(f"llave_jax.{name}")
    with pytest.raises(SystemExit) as ended:
        module.parse_args(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    flags = {word.strip("[],") for word in text.split() if word.startswith(("--", "[--"))}
    assert {"--verbose"} <= flags
    assert not [flag for flag in flags if "_" in flag.partition("=")[0] and "." not in flag]


@pytest.mark.parametrize(
    "arguments", [["--output", "gs://bucket/run"], ["--output=s3://bucket"], ["gs://bucket"]]
)
def test_buckets_are_refused(arguments, capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(arguments)
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert arguments[-1].removeprefix("--output=") in line
    assert "mount the bucket" in line


def test_buckets_are_refused_in_a_config(capsys):
    arguments = ["--config", "quickstart", "--config.data.path=gs://bucket/pairs"]
    with pytest.raises(SystemExit):
        parser(takes_config=True).parse_args(arguments)
    assert "gs://bucket/pairs" in capsys.readouterr().err


def test_an_unknown_flag_is_one_line(capsys):
    with pytest.raises(SystemExit) as ended:
        parser().parse_args(["--batchsize", "8"])
    assert ended.value.code == 2
    assert capsys.readouterr().err == (
        "error: unrecognized arguments: --batchsize 8 (--help lists the flags)\n"
    )


@pytest.mark.parametrize(
    "name", ["quickstart", "quickstart.py", str(ROOT / "configs/quickstart.py")]
)
def test_a_config_by_name_or_path(name):
    overrides = ["--config.data.path", "X", "--config.loss.hard_negatives", "--config.steps=7"]
    overrides += ["--config.mesh.fsdp", "-1", "--config.model.inputs.pinpoints=2,2"]
    config = parser(takes_config=True).parse_args(["--config", name, *overrides]).config
    assert (config.data.path, config.loss.hard_negatives, config.steps) == ("X", True, 7)
    assert (config.mesh.fsdp, config.model.inputs.pinpoints) == (-1, (2, 2))
    assert config.model.preset == "tiny"


def test_a_config_with_an_argument():
    assert command_line.load_config("tpu_v4:2b").model.preset == "llave-2b"


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["llave_2c"], "--config llave_2c: .* nor is it one of the shipped configs: ablations, "),
        (["my/own.py"], "--config my/own.py: there is no such file"),
        (["tpu_v4:9b"], "9b: expected one of 0.5b, 2b, 7b"),
        (["llave_2b:x"], "--config llave_2b:x: get_config in .*: too many positional arguments"),
        (
            ["llave_2b", "--config.optim.learning_rat=1"],
            "no such field .*learning_rat.* Did you mean",
        ),
        (["llave_2b", "--config.steps=many"], "--config.steps=many: invalid literal for int"),
        (["llave_2b", "--confg.steps=7"], "confg.steps"),
        (["llave_2b", "7"], "unrecognized arguments: 7"),
    ],
)
def test_a_mistake_in_a_config_is_one_line(arguments, says, capsys):
    with pytest.raises(SystemExit) as ended:
        parser(takes_config=True).parse_args(["--config", *arguments])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert re.search(says, line), line


def run_with(error, **flags):
    def action(args):
        raise error

    return command_line.run(action, argparse.Namespace(verbose=False, **flags))


def test_a_users_error_is_one_line(capsys):
    assert run_with(FileNotFoundError("no such data")) == 2
    assert capsys.readouterr().err == "error: no such data\n"


def test_an_error_of_the_system_begins_with_the_file(tmp_path, capsys):
    with pytest.raises(FileNotFoundError) as raised:
        (tmp_path / "gone.jsonl").open()
    assert run_with(raised.value) == 2
    expected = f"error: {tmp_path}/gone.jsonl: No such file or directory\n"
    assert capsys.readouterr().err == expected


def test_verbose_shows_where_an_error_comes_from():
    def action(args):
        raise ValueError("a mistake")

    with pytest.raises(ValueError, match="a mistake"):
        command_line.run(action, argparse.Namespace(verbose=True))


def test_an_error_of_the_program_is_not_hidden():
    with pytest.raises(TypeError):
        run_with(TypeError("a bug"))


def test_an_error_fits_on_a_screen(capsys):
    assert run_with(ValueError("\n".join(f"line {i}" for i in range(200)))) == 2
    said = capsys.readouterr().err
    assert len(said.splitlines()) <= command_line.MAX_LINES + 1
    assert "--verbose shows all of it" in said
    run_with(ValueError("x" * 10_000))
    assert len(capsys.readouterr().err) < 2000


def test_what_a_library_raised_says_so(capsys):
    def action(args):
        return int("many")  # raised here, in a file that is not the package's

    assert command_line.run(action, argparse.Namespace(verbose=False)) == 2
    assert "(ValueError in test_command_line.py; --verbose shows more)" in capsys.readouterr().err


def test_training_ends_with_one_line_and_a_status(tmp_path):
    command = [sys.executable, "-m", "llave_jax.train", "--config", "finetune"]
    command += ["--workdir", tmp_path / "run", "--config.data.path=/nowhere"]
    environment = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    """The wheel as pip builds it, without what it depends on."""
    folder = tmp_path_factory.mktemp("wheel")
    # A build leaves files beside what it builds from.
    for name in ("llave_jax", "configs"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "NOTICE"):
        shutil.copy(ROOT / name, folder)
    command = [sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-build-isolation"]
    command += ["--quiet", "--wheel-dir", folder / "dist", folder]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = folder.glob("dist/*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_has_all_modules_and_configs(wheel):
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / "llave_jax").rglob("*.py")}
    configs = {f"llave_jax/configs/{path.name}" for path in (ROOT / "configs").glob("*.py")}
    assert modules | configs | {"llave_jax/py.typed"} <= names
    assert not [name for name in names if name.startswith(("configs/", "tests/", "tools/"))]


@pytest.mark.slow
def test_an_installed_package_finds_its_configs_and_commands(wheel, tmp_path):
    """Far from the checkout; other packages come from the environment of the tests."""
    venv.create(tmp_path / "venv", with_pip=True, system_site_packages=False)
    python = tmp_path / "venv/bin/python"
    (site,) = (tmp_path / "venv/lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others))
    program = (
        "from llave_jax.common.command_line import find_config, load_config; "
        "print(find_config('llave_2b')[0], load_config('ablations:7').loss.kind)"
    )
    environment = {"PATH": "/usr/bin:/bin", "JAX_PLATFORMS": "cpu"}
    options = {"cwd": tmp_path, "env": environment, "capture_output": True, "text": True}
    install = [python, "-m", "pip", "install", "--quiet", "--no-deps", wheel]
    subprocess.run(install, check=True, **options)
    done = subprocess.run([python, "-c", program], **options)
    assert done.stdout.split() == [str(site / "llave_jax/configs/llave_2b.py"), "focal"], (
        done.stderr
    )
    scripts = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["scripts"]
    assert set(scripts) >= {"llave-train", "llave-embed", "llave-evaluate", "llave-convert"}
    for script in scripts:
        done = subprocess.run([tmp_path / "venv/bin" / script, "--help"], **options)
        assert done.stdout.startswith(f"usage: {script} "), done.stderr


def test_a_long_value_in_an_error_is_named_by_its_beginning(capsys, caplog):
    """Five megabytes of an image where its path belongs: one line of error, one of a warning."""
    uri = "data:image/png;base64," + "QUJD" * (5 << 18)

    def fail(_):
        raise ValueError(f"rows.json row 7 ({uri}): no such file {'in ' * 90}")

    arguments = argparse.Namespace(verbose=False)
    assert command_line.run(fail, arguments) == 2
    said = capsys.readouterr().err
    assert said.startswith(
        f"error: rows.json row 7 ({uri[:59]}... ({len(uri) + 3} characters) no such"
    )
    assert said.count("\n") == 1
    command_line.set_up_logging(arguments)
    logging.getLogger("llave_jax.example").warning("skipped %s", uri)
    assert capsys.readouterr().err == f"warning: skipped {uri[:60]}... ({len(uri)} characters)\n"


def test_a_missing_torch_is_not_mentioned():
    script = (
        "import importlib.util as u; find = u.find_spec\n"
        "u.find_spec = lambda name, *rest: None if name == 'torch' else find(name, *rest)\n"
        "{}import transformers"
    )
    said = [
        subprocess.run(
            [sys.executable, "-c", script.format(first)], cwd=ROOT, capture_output=True, text=True
        ).stderr
        for first in ("", "import llave_jax; ")
    ]
    assert "PyTorch was not found" in said[0]
    assert said[1] == ""
