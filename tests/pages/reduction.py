"""The rules by which commands of the pages become small. No command is rewritten.

1. Names on the pages lead to small stand-ins (stand_ins.py): tiny models, a few rows, generated pictures.
2. Flags are appended to a program's arguments, by its name and the config that it is given (`APPENDED`): of
   equal flags the last one counts. This is done by a `python` that stands first on the path.
3. A loop makes its first turn, and those whose results a later block of the page names; one that starts
   processes side by side makes all.
4. A server without --port, which its reader stops, is stopped when its page has answered.
5. `pip` checks that the extras exist and installs nothing: `.ci/run` installs.
"""

from __future__ import annotations

import re
import shlex
import sys
from pathlib import Path

# A program, with the config that it is given or without -> what is appended. All that match apply.
APPENDED = {
    ("-m llave_jax.train", ""): "--config.steps=2 --config.log_every=1 --config.data.num_workers=0",
    (
        "-m llave_jax.train",
        "configs/quickstart.py",
    ): f"--config={Path(__file__).parent}/quickstart.py --config.eval.benchmark=None",
    ("-m llave_jax.train", "configs/finetune.py"): "--config.batch.pairs=8",
    ("-m llave_jax.train", "configs/matryoshka.py"): "--config.batch.pairs=8 "
    "'--config.loss.dims=(16,64)'",
    ("-m llave_jax.train", "configs/llave_"): "--config.steps=1 --config.batch.pairs=8 "
    "--config.batch.micro_batches=2 --config.model.inputs.max_length=512",
    # Embeddings of the stand-ins have 64 numbers.
    ("-m llave_jax.evaluate", "--dims 64,256"): "--dims=16,64",
    (
        "-m llave_jax.evaluate",
        "results/v2",
    ): "--max-length=2048 --tasks=MSVD,ImageNet-1K,ViDoRe_arxivqa",
    ("tools/prepare_data.py", ""): "--num-workers=1",
    # The stand-in's embeddings do not have the size of a released model's.
    ("tools/check_example.py", ""): "--size=0.5B",
    ("benchmarks/input_pipeline.py", ""): "--model=tiny --pairs=4 --repeats=1 --rows=40",
    ("benchmarks/index.py", ""): "--rows=10000 --dim=32",
    ("benchmarks/embed_file.py", ""): "--sizes 50",
    ("benchmarks/serve_load.py", ""): "--clients 2 --seconds 2 --offline-seconds 1 --size 64",
    ("benchmarks/pack_efficiency.py", ""): "--pairs=1500",
    ("benchmarks/loss_memory.py", ""): "--pairs 256 --dims 16",
}
# Exit statuses other than 0: the cosines of a stand-in are not the published ones.
STATUS = {"tools/check_example.py": 1}

# What a block needs that cannot be run has one of these words. A mark at a block without them is stale.
OUTSIDE = (
    *("gcloud", "gcsfuse", "xpk", "sbatch", "docker", "hf download", "pytest", "launch/tpu_vm.sh"),
    "mteb:",
    *("tools/compile_ahead.py", "benchmarks/gpu_kernels.py", "benchmarks/tpu_kernels.py"),
    *("configs/gpu_h100.py", "sentence_transformers", "vllm", "--library", "--url", "--engine ray"),
    "openai",  # which a server has to answer
)

# Of the server of rule 4; the pages name others.
_PORT = 8017


def reaches_outside(text: str) -> bool:
    """Whether a block has a program of `OUTSIDE`."""
    return any(re.search(rf"(?<![\w/.-]){re.escape(word)}\b", text) for word in OUTSIDE)


def reduce_loops(text: str, later: str) -> str:
    """Rule 3.

    Args:
      text: a bash block.
      later: what stands behind it on the page.
    """

    def reduced(loop: re.Match) -> str:
        name, values, body = loop[1], loop[2].split(), loop[3]
        if re.search(r"&$", body, flags=re.M):
            return loop[0]
        words = [word for word in body.split() if f"${name}" in word and "$(" not in word]

        def is_named(value: str) -> bool:
            paths = (word.replace(f"${name}", value) for word in words if "/" in word)
            return any(re.search(rf"{re.escape(path)}(?![\w.])", later) for path in paths)

        kept = [v for number, v in enumerate(values) if number == 0 or is_named(v)]
        return f"for {name} in {' '.join(kept)}; do{body}done"

    return re.sub(r"\bfor (\w+) in ([\w. ]+); do\b(.*?)^done", reduced, text, flags=re.M | re.S)


def install(folder: Path, extras: set[str]) -> None:
    """Writes the `python` and `pip` of rules 2, 4 and 5 to a folder for the path.

    Args:
      folder: a new one.
      extras: those of the package.
    """
    folder.mkdir()
    cases = []
    for (program, config), flags in APPENDED.items():
        cases.append(f'[[ "$given " == "{program} "*"{config}"* ]] && more+=({flags})')
    for program, status in STATUS.items():
        cases.append(f'[[ "$given " == "{program} "* ]] && expected={status}')
    script = [
        "#!/usr/bin/env bash",
        'given="$*" more=() expected=0',
        *cases,
        f'[[ $given == "-m llave_jax.serve "* && $given != *--port* ]] && {{ {_visit(sys.executable)}; }}',
        # Signals of the page's reach a server itself.
        f'[[ $given == "-m llave_jax.serve "* ]] && exec {shlex.quote(sys.executable)} "$@"',
        f'{shlex.quote(sys.executable)} "$@" "${{more[@]}}"',
        "status=$?",
        "[[ $status == $expected ]] && exit 0",
        'echo "exit status $status of: python $given ${more[*]}" >&2',
        "exit 1",
    ]
    _write(folder / "python", "\n".join(script))
    known = "|".join(sorted(extras))
    _write(
        folder / "pip",
        f"""#!/usr/bin/env bash
[[ $1 == install ]] || {{ echo "pip $*" >&2; exit 1; }}
for word in "${{@:2}}"; do
  [[ $word =~ ^(-e|\\.|\\.\\[({known})(,({known}))*\\]|jax\\[[a-z0-9-]+\\]|torch==[0-9.]+|triton)$ ]] ||
    {{ echo "pip install: $word" >&2; exit 1; }}
done""",
    )


def _visit(python: str) -> str:
    """Rule 4, in bash."""
    url = f"http://127.0.0.1:{_PORT}"
    retries = "--retry 300 --retry-delay 1 --retry-all-errors"
    return (
        f'{shlex.quote(python)} "$@" --port {_PORT} & '
        f"curl -sS --fail --output /dev/null {retries} {url}/ready && "
        f"curl -sS --fail {url}/ | grep -q '<html' || exit 1; kill -TERM $! && wait $!; exit $?"
    )


def _write(program: Path, text: str) -> None:
    program.write_text(text + "\n")
    program.chmod(0o755)
