"""What a user calls a model, and the model directory that is loaded: on the disk, and from a hub."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from llave_jax import Embedder
from llave_jax.weights import from_hf, model_dir, resolve
from llave_jax.weights.resolve import resolve_model
from llave_jax.weights.safetensors_io import CheckpointError
from tests.weights import hub as hubs
from tests.weights.convert_checkpoints import LAYOUTS, assert_same_files, write_hf
from tools import convert_hf

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    """The cache of conversions, empty."""
    monkeypatch.setenv("LLAVE_JAX_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache" / "models"


@pytest.fixture
def checkpoint(tmp_path) -> Path:
    return write_hf(tmp_path / "hf" / "tiny")


@pytest.fixture
def conversions(monkeypatch) -> list[Path]:
    """Sources of the conversions that are made."""
    made = []

    def convert(source, *args, **options):
        made.append(Path(source))
        return from_hf.convert_from_hf(source, *args, show_progress=False, **options)

    monkeypatch.setattr(resolve, "convert_from_hf", convert)
    return made


def kept(cache: Path) -> list[str]:
    """What is in the cache, but for locks."""
    return sorted(path.name for path in cache.iterdir() if path.suffix != ".lock")


# On the disk


def test_model_directories_and_runs_are_taken_as_they_are(golden_model, tmp_path, cache):
    assert resolve_model(golden_model.directory) == golden_model.directory
    run = tmp_path / "run"
    shutil.copytree(golden_model.directory, run / "model")
    (run / "config.json").write_text("{}")
    assert resolve_model(str(run)) == run
    assert not cache.exists()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_checkpoint_is_converted_once(tmp_path, cache, conversions, layout, golden_model):
    checkpoint = write_hf(tmp_path / "hf" / "tiny", layout, shards=2)
    first = resolve_model(checkpoint)
    assert first.parent == cache
    assert resolve_model(checkpoint) == first
    assert conversions == [checkpoint]
    assert kept(cache) == [first.name]
    from_hf.convert_from_hf(checkpoint, tmp_path / "by_hand", show_progress=False)
    assert_same_files(first, tmp_path / "by_hand")


def test_embeddings_are_those_of_the_converted_model(checkpoint, golden_model):
    items = ["A cat and a dog", "Something else"]
    ours = Embedder.from_pretrained(checkpoint).encode(items)
    np.testing.assert_array_equal(
        ours, Embedder.from_pretrained(golden_model.directory).encode(items)
    )


@pytest.mark.parametrize(
    "file", ["config.json", "tokenizer.json", "model.safetensors", "README.md"]
)
def test_a_changed_checkpoint_is_converted_again(checkpoint, cache, conversions, file):
    """Also where size and time of the file stay, as after a copy that keeps them."""
    (checkpoint / "README.md").write_text("a model")
    first = resolve_model(checkpoint)
    path = checkpoint / file
    status = path.stat()
    content = bytearray(path.read_bytes())
    content[-2:] = {"README.md": b"EL", "model.safetensors": b"\0\0"}.get(file, b" }")
    path.write_bytes(bytes(content))
    os.utime(path, ns=(status.st_atime_ns, status.st_mtime_ns))
    assert path.stat().st_size == status.st_size
    assert resolve_model(checkpoint) != first
    assert len(conversions) == 2


def test_a_large_file_that_is_changed_between_the_samples_is_noticed(
    checkpoint, conversions, monkeypatch
):
    monkeypatch.setattr("llave_jax.common.content._WHOLE_FILE_BYTES", 1)
    monkeypatch.setattr("llave_jax.common.content._BLOCKS", 2)
    monkeypatch.setattr("llave_jax.common.content._BLOCK_BYTES", 16)
    first = resolve_model(checkpoint)
    path = checkpoint / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(bytes(content))
    assert resolve_model(checkpoint) != first


def test_the_vision_towers_own_config_decides_as_well(checkpoint):
    first = resolve_model(checkpoint)
    tower = checkpoint.parent / "siglip-tiny-open-patch30-224" / "config.json"
    tower.write_text(tower.read_text() + "\n")
    assert resolve_model(checkpoint) != first


def test_processes_share_one_conversion(checkpoint, cache, monkeypatch):
    """Those that come while it is made wait for it."""
    began, go_on, made = threading.Event(), threading.Event(), []

    def convert(source, output, **options):
        made.append(source)
        began.set()
        assert go_on.wait(60)
        return from_hf.convert_from_hf(source, output, show_progress=False, **options)

    monkeypatch.setattr(resolve, "convert_from_hf", convert)
    # They could not convert if they tried.
    program = (
        "import sys; from llave_jax.weights import resolve; resolve.convert_from_hf = None\n"
        "print('asks', flush=True); print(resolve.resolve_model(sys.argv[1]))"
    )
    first = threading.Thread(target=resolve_model, args=[checkpoint])
    first.start()
    assert began.wait(60)
    command = [sys.executable, "-c", program, str(checkpoint)]
    others = [subprocess.Popen(command, stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    for other in others:
        assert other.stdout.readline() == b"asks\n"
    go_on.set()
    first.join()
    found = {other.communicate(timeout=60)[0].decode().strip() for other in others}
    assert found == {str(cache / kept(cache)[0])}
    assert made == [checkpoint]


def test_an_interrupted_conversion_leaves_nothing_half_written(checkpoint, cache, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(from_hf, "_write_layout", interrupt)
        with pytest.raises(KeyboardInterrupt):
            resolve_model(checkpoint)
    assert kept(cache) == []
    # A killed one cannot tidy up; the next one does.
    program = (
        "import os, signal, sys; from llave_jax.weights import from_hf, resolve\n"
        "from_hf._write_layout = lambda *_: os.kill(os.getpid(), signal.SIGKILL)\n"
        "resolve.resolve_model(sys.argv[1])"
    )
    done = subprocess.run([sys.executable, "-c", program, str(checkpoint)], cwd=ROOT, stderr=-3)
    assert done.returncode < 0
    (partial,) = kept(cache)
    assert partial.endswith(".partial")
    made = resolve_model(checkpoint)
    assert kept(cache) == [made.name]
    (made / model_dir.WEIGHTS).unlink()
    assert (resolve_model(checkpoint) / model_dir.WEIGHTS).is_file()


def test_a_cache_that_cannot_be_written(checkpoint, tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("LLAVE_JAX_CACHE", str(tmp_path / "file"))
    with pytest.raises(OSError, match=r"cannot be written .*LLAVE_JAX_CACHE names another folder"):
        resolve_model(checkpoint)


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("/no/such/model", "no such directory"),
        ("no_such_model", "no such directory .a model on the hub is called org/name"),
        ("a/b/c", "no such directory"),
        ("../b", "no such directory"),
        ("empty", "neither a model directory nor a training run"),
    ],
)
def test_what_is_no_model(tmp_path, monkeypatch, name, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "empty").mkdir()
    monkeypatch.setattr(resolve, "_download", lambda *_: pytest.fail("asked the hub"))
    with pytest.raises(CheckpointError, match=said):
        resolve_model(name)


# On the hub


@pytest.fixture(scope="module")
def hub():
    with hubs.serve() as hub:
        yield hub


@pytest.fixture
def environment(hub, tmp_path, monkeypatch):
    """That of a user of `hub`, whose cache is empty. The library reads it when it is imported."""
    hub.requests.clear()
    for name in ("HF_TOKEN", "HF_HUB_OFFLINE", "HF_HUB_CACHE", "HF_TOKEN_PATH"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HF_ENDPOINT", hub.endpoint)
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hf_home"))
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    return monkeypatch


def llave(tmp_path: Path, **options) -> dict[str, bytes]:
    """The files of a checkpoint in the authors' layout, with what its hub page might have besides."""
    files = hubs.files_of(write_hf(tmp_path / "published" / "tiny", **options))
    tower = "siglip-tiny-open-patch30-224/config.json"
    files[tower] = (tmp_path / "published" / tower).read_bytes()
    return files | {
        "README.md": b"---\nlicense: apache-2.0\n---\n",
        ".gitattributes": b"",
        "modeling_llava.py": b"raise SystemExit('code was run')",
        "pytorch_model.bin": b"pickled",
        "training_args.bin": b"pickled",
        "checkpoint-100/model.safetensors": b"of an earlier step",
        "example.jpg": b"a picture",
    }


def command(*arguments, cwd) -> subprocess.CompletedProcess:
    program = [sys.executable, str(ROOT / "tools" / "convert_hf.py"), *map(str, arguments)]
    return subprocess.run(program, cwd=cwd, capture_output=True, text=True, timeout=120)


def resolved(name: str, cwd: Path) -> tuple[Path | None, str]:
    """What `resolve_model` returns in a process of its own, and what is said on stderr."""
    program = (
        "import argparse, sys; from llave_jax.common import command_line\n"
        "from llave_jax.weights.resolve import resolve_model\n"
        "args = argparse.Namespace(verbose=False, name=sys.argv[1])\n"
        "command_line.set_up_logging(args)\n"
        "sys.exit(command_line.run(lambda args: print(resolve_model(args.name)), args))"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, name], cwd=cwd, capture_output=True, text=True, timeout=120
    )
    return (Path(done.stdout.strip()) if done.returncode == 0 else None), done.stderr


def test_a_model_of_the_hub(hub, environment, tmp_path, cache):
    files = llave(tmp_path, shards=2)
    hub.repo("lab/LLaVE-tiny", files)
    found, said = resolved("lab/LLaVE-tiny", tmp_path)
    assert found is not None, said
    assert found.name.startswith("lab--LLaVE-tiny-")
    assert "code was run" not in said
    # Safetensors, JSON, tokenizer and card; no pickle, no code, no earlier step.
    assert hub.downloads() == {
        path
        for path in files
        if path.endswith((".json", ".safetensors", "merges.txt")) and "checkpoint-" not in path
    } | {"README.md"}
    from_hf.convert_from_hf(
        tmp_path / "published" / "tiny", tmp_path / "by_hand", show_progress=False
    )
    for part in (model_dir.CONFIG, model_dir.WEIGHTS):
        assert (found / part).read_bytes() == (tmp_path / "by_hand" / part).read_bytes()

    # The second time nothing is downloaded or converted, nor is anything said.
    hub.requests.clear()
    assert resolved("lab/LLaVE-tiny", tmp_path) == (found, "")
    assert hub.downloads() == set()
    # Without a network, or forbidden to use it.
    hub.requests.clear()
    environment.setenv("HF_HUB_OFFLINE", "1")
    assert resolved("lab/LLaVE-tiny", tmp_path) == (found, "")
    environment.delenv("HF_HUB_OFFLINE")
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    assert resolved("lab/LLaVE-tiny", tmp_path)[0] == found
    assert hub.requests == []
    # What is on the disk goes first.
    shutil.copytree(found, tmp_path / "lab" / "LLaVE-tiny")
    assert resolved("lab/LLaVE-tiny", tmp_path) == (Path("lab/LLaVE-tiny"), "")


def test_revisions_and_model_directories_of_the_hub(
    hub, environment, tmp_path, golden_model, cache
):
    repo = hub.repo("lab/two", llave(tmp_path))
    second = repo.commit(hubs.files_of(golden_model.directory), "v2")
    for revision in ("v2", second):
        found, said = resolved(f"lab/two@{revision}", tmp_path)
        assert found is not None, said
        # It is one of ours: nothing to convert.
        assert found.name == second
        assert model_dir.load_config(found) == golden_model.config
        assert model_dir.open_params(found).keys()
    assert not cache.exists()
    environment.setenv("HF_HUB_OFFLINE", "1")
    _, said = resolved("lab/two", tmp_path)
    assert said.startswith(
        "error: lab/two: no such directory, and not (or not wholly) in the hub's"
    )


@pytest.mark.parametrize(
    ("name", "token", "said"),
    [
        ("lab/absent", None, "no such directory, and no such model at {hub}/lab/absent. If it is private: log"),
        ("lab/absent", hubs.TOKEN, "no such directory, and no such model at {hub}/lab/absent"),
        ("lab/private", None, "no such directory, and no such model at {hub}/lab/private. If it is private: log"),
        ("lab/gated", None, "its owner asks for consent: accept the terms at {hub}/lab/gated, then log in"),
        ("lab/model@v9", None, "lab/model has no revision v9; its branches and tags are at {hub}/lab/model"),
        ("lab/model", "hf_old", "does not accept the token: log in with `hf auth login`, or set HF_TOKEN"),
        ("lab/pickled", None, "has no weights in safetensors. Pickled ones can run code"),
    ],
)  # fmt: skip
def test_errors_of_the_hub_are_one_line(hub, environment, tmp_path, name, token, said):
    hub.repo("lab/model", {"config.json": b"{}", "model.safetensors": b""})
    hub.repo("lab/private", {"config.json": b"{}"}, "private")
    hub.repo("lab/gated", {"config.json": b"{}", "model.safetensors": b""}, "gated")
    hub.repo("lab/pickled", {"config.json": b"{}", "pytorch_model.bin": b"pickled"})
    if token:
        environment.setenv("HF_TOKEN", token)
    found, error = resolved(name, tmp_path)
    assert found is None
    assert error.startswith(f"error: {name}: ")
    assert said.format(hub=hub.endpoint) in error
    assert error.count("\n") == 1


def test_without_a_network(environment, tmp_path):
    environment.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    _, said = resolved("models/mistyped", tmp_path)
    assert said.startswith("error: models/mistyped: no such directory, and not (or not wholly) in")
    assert "http://127.0.0.1:9 could not be reached" in said
    assert said.count("\n") == 1


@pytest.mark.slow
def test_an_interrupted_download_goes_on(hub, environment, tmp_path):
    hub.repo("lab/large", llave(tmp_path))
    hub.cut = 100_000
    found, said = resolved("lab/large", tmp_path)
    hub.cut = None
    assert found is None
    assert said.splitlines()[-1].startswith("error: lab/large: ")
    assert "Traceback" not in said
    found, said = resolved("lab/large", tmp_path)
    assert found is not None, said


def test_the_converter_takes_names_of_the_hub(hub, environment, tmp_path, cache):
    hub.repo("lab/tiny", llave(tmp_path))
    environment.setenv("HF_TOKEN", hubs.TOKEN)
    hub.repos["lab/tiny"].access = "private"
    done = command("--input", "lab/tiny", "--output", "out", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert model_dir.is_model_dir(tmp_path / "out")
    assert not cache.exists()
    # The card that the hub's page has goes along.
    assert (tmp_path / "out" / "source" / "README.md").read_text().startswith("---\nlicense")


def test_the_converter_exports_a_checkpoint_in_the_other_layout(checkpoint, tmp_path):
    output = tmp_path / "onevision"
    arguments = ["--input", str(checkpoint), "--to-hf", "onevision", "--output", str(output)]
    arguments += ["--no-check-vectors"]
    assert convert_hf.main(arguments) == 0
    assert "llava_onevision" in (output / "config.json").read_text()
