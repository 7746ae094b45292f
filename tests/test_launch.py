"""docs/launch.md and what it hands out: the scripts in launch/ run against stand-ins for the clouds' commands,
the Dockerfile is linted.

shellcheck and hadolint come with the test extra where there is a build of them.
"""

import math
import os
import re
import shutil
import signal
import stat
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest

from llave_jax.common import command_line
from llave_jax.config import default_config
from llave_jax.parallel import processes

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted((ROOT / "launch").glob("*.sh"))
PAGE = (ROOT / "docs/launch.md").read_text()
OPERATIONS = (ROOT / "docs/operations.md").read_text()
SCALING = (ROOT / "docs/scaling.md").read_text()
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def linter(name):
    """Path of a linter that is a Python package; skips where there is none."""
    found = shutil.which(name)
    if found is None:
        pytest.skip(f"{name} is not installed")
    return found


def stand_in(folder, name, script):
    """A program of this name, first on the path of `environment(folder)`."""
    folder.mkdir(exist_ok=True)
    program = folder / name
    program.write_text("#!/usr/bin/env bash\n" + script)
    program.chmod(0o755)


def environment(folder, **more):
    return {**os.environ, "PATH": f"{folder}:{os.environ['PATH']}", **more}


def copy(source, target):
    """As a Dockerfile's COPY: a file into the folder `target`, of a folder what is in it."""
    target.mkdir(parents=True, exist_ok=True)
    if (ROOT / source).is_dir():
        shutil.copytree(ROOT / source, target, dirs_exist_ok=True)
    else:
        shutil.copy(ROOT / source, target)


def assert_installs(folder):
    """The package can be installed from what lies in `folder`, by what pip does first."""
    script = "from setuptools import build_meta as b; b.prepare_metadata_for_build_editable('.')"
    command = [sys.executable, "-c", script]
    done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


def test_sources_are_those_that_are_named():
    listed = set(map(int, re.findall(r"^\| (\d+) \|", PAGE, flags=re.M)))
    named = set()
    for numbers in re.findall(r"(?<!\])\[(\d[\d, ]*)\]", PAGE):
        named |= set(map(int, numbers.split(",")))
    assert named == listed


def test_costs_are_those_of_scaling():
    """Hours of an epoch are the pairs divided by the speeds of docs/scaling.md."""
    rows = [
        re.split(r" *\| *", line)[1:-1] for line in SCALING.splitlines() if line.startswith("|")
    ]
    speeds = {tuple(row[:2]): float(row[-2]) for row in rows if re.match(r"v\d|[ah]100:", row[1])}
    pairs = int(re.search(r"the paper's ([\d ]+) pairs", PAGE)[1].replace(" ", ""))
    costs = re.findall(r"^\| (\S+B) \| (\S+) \| ([\d.]+) \| ([\d.]+) \|$", PAGE, flags=re.M)
    assert {cost[:2] for cost in costs} == set(speeds)
    for model, topology, hours, chip_hours in costs:
        chips = math.prod(map(int, topology.partition(":")[2].split("x")))
        expected = pairs / speeds[model, topology] / 3600
        assert chip_hours == f"{expected:.1f}"
        assert hours == f"{expected / chips:.1f}"


def test_training_commands_of_the_scripts_have_files_and_fields():
    """Those in the scripts' comments; the page's own are tested with all pages'."""
    config = default_config()
    commands = re.findall(
        r"--config (configs/[\w.]+):?\S*((?:.|\n#)*)", "".join(map(Path.read_text, SCRIPTS))
    )
    assert len(commands) == 2
    for file, rest in commands:
        assert (ROOT / file).exists()
        for field in re.findall(r"--config\.([\w.]+)=", rest):
            section, _, key = field.partition(".")
            assert key in config[section]


def test_scripts_know_the_exit_statuses():
    slurm, loop = (
        (ROOT / "launch" / f"{name}.sh").read_text() for name in ("slurm", "keep_running")
    )
    assert f"status == {processes.STOPPED}" in slurm
    assert f"$status == [0{command_line.USER_ERROR}]" in loop
    assert f"| SIGTERM | the step that was under way | {processes.STOPPED} |" in OPERATIONS


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_scripts_are_sound(script):
    assert script.stat().st_mode & stat.S_IXUSR
    parsed = subprocess.run(["bash", "-n", script], capture_output=True, text=True)
    assert not parsed.stderr
    assert f"launch/{script.name}" in PAGE


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.name)
def test_shellcheck(script):
    checked = subprocess.run([linter("shellcheck"), script], capture_output=True, text=True)
    assert checked.returncode == 0, checked.stdout


class TestKeepRunning:
    """The loop that starts a command again until it is complete."""

    SCRIPT = ROOT / "launch/keep_running.sh"

    def run(self, folder, command, **settings):
        status = folder / "status"
        done = subprocess.run(
            [self.SCRIPT, "bash", "-c", command],
            env={**os.environ, "PAUSE": "0", "STATUS": str(status), **settings},
            cwd=folder,
            capture_output=True,
            text=True,
            timeout=60,
        )
        assert status.read_text() == f"{done.returncode}\n"
        return done

    def test_starts_again_until_complete(self, tmp_path):
        done = self.run(tmp_path, "echo >>starts; (($(wc -l <starts) == 3)) || exit 134")
        assert done.returncode == 0
        assert (tmp_path / "starts").read_text().count("\n") == 3
        assert done.stderr.count("exit status 134; starting again") == 2

    def test_gives_up_when_starting_again_does_not_help(self, tmp_path):
        done = self.run(tmp_path, "echo >>starts; exit 7", TRIES="4")
        assert done.returncode == 7
        assert (tmp_path / "starts").read_text().count("\n") == 4
        assert "7, 4 times in a row" in done.stderr

    def test_mistakes_are_not_tried_again(self, tmp_path):
        done = self.run(tmp_path, "echo >>starts; exit 2")
        assert done.returncode == 2
        assert (tmp_path / "starts").read_text().count("\n") == 1

    def test_late_failures_do_not_count(self, tmp_path):
        done = self.run(tmp_path, "echo >>starts; (($(wc -l <starts) == 5)) || exit 1", SOON="0")
        assert done.returncode == 0

    def test_leaves_no_helpers_behind(self, tmp_path):
        self.run(tmp_path, "sleep 600 & echo $! >>helpers; (($(wc -l <helpers) == 2)) || exit 6")
        for helper in (tmp_path / "helpers").read_text().split():
            state = subprocess.run(["ps", "-o", "state=", "-p", helper], capture_output=True)
            assert state.stdout.strip() in (b"", b"Z")

    def test_passes_the_signal_on_and_waits(self, tmp_path):
        command = (
            'trap "sleep 1; echo saved >saved; exit 143" TERM; touch up; while :; do sleep .1; done'
        )
        status = tmp_path / "status"
        loop = subprocess.Popen(
            [self.SCRIPT, "bash", "-c", command],
            cwd=tmp_path,
            env={**os.environ, "STATUS": str(status)},
        )
        while not (tmp_path / "up").exists():
            time.sleep(0.05)
        loop.send_signal(signal.SIGTERM)
        assert loop.wait(60) == 143
        assert (tmp_path / "saved").exists()
        assert status.read_text() == "143\n"


class TestSlurm:
    SCRIPT = ROOT / "launch/slurm.sh"

    def options(self):
        lines = re.findall(r"^#SBATCH --(\S+)$", self.SCRIPT.read_text(), flags=re.M)
        return dict(line.partition("=")[::2] for line in lines)

    def run(self, folder, status, *overrides):
        stand_in(folder, "srun", f'echo "$XLA_CLIENT_MEM_FRACTION" "$@" >>"$CALLS"; exit {status}')
        stand_in(folder, "scontrol", 'echo scontrol "$@" >>"$CALLS"')
        calls = folder / "calls"
        job = {"SLURM_JOB_ID": "42", "SLURM_CPUS_PER_TASK": "8", "CALLS": str(calls)}
        done = subprocess.run(
            [self.SCRIPT, "--config", "configs/gpu_h100.py:7b", "--workdir", "a run", *overrides],
            env=environment(folder, **job),
            capture_output=True,
            text=True,
        )
        assert done.returncode == status
        return calls.read_text().splitlines()

    def test_processes_see_all_gpus_of_a_node(self):
        options = self.options()
        assert options["ntasks-per-node"] == options["gpus-per-node"]
        assert "gpus-per-task" not in options

    def test_there_is_time_to_save(self):
        options = self.options()
        assert options["signal"].startswith("TERM@")
        assert int(options["signal"].partition("@")[2]) >= 300
        assert "requeue" in options
        assert options["open-mode"] == "append"

    def test_workers_fit_the_cores(self, tmp_path):
        (call,) = self.run(tmp_path, 0)
        workers = int(re.search(r"data\.num_workers=(\d+)", call)[1])
        assert workers < int(self.options()["cpus-per-task"])
        assert call.startswith("0.92 --cpus-per-task=8 ")
        # An override must not stand before its config.
        assert "--config configs/gpu_h100.py:7b --workdir a run --config.data.num_workers" in call
        (call,) = self.run(tmp_path, 0, "--config.data.num_workers=5")[1:]
        assert re.findall(r"data\.num_workers=(\d+)", call) == ["5"]

    @pytest.mark.parametrize(("status", "requeued"), [(0, False), (1, False), (143, True)])
    def test_only_a_run_that_was_told_to_stop_goes_back(self, tmp_path, status, requeued):
        calls = self.run(tmp_path, status)
        assert (calls[-1] == "scontrol requeue 42") == requeued


# gcloud as launch/tpu_vm.sh uses it. Files in $CLOUD are the cloud: `states` has the state that each
# question will find, one a line, the last one for ever; hosts are folders, on which commands really run.
GCLOUD = r"""
echo "${*//$'\n'/ }" >>"$CLOUD/calls"
case "$3 $4" in
  "queued-resources describe")
    echo "WARNING: a newer version of gcloud is there" >&2
    read -r now <"$CLOUD/states"
    (($(wc -l <"$CLOUD/states") == 1)) || sed -i 1d "$CLOUD/states"
    [[ $now != NONE ]] || { echo "ERROR: NOT_FOUND: no such request" >&2; exit 1; }
    [[ $now != DENIED ]] || { echo "ERROR: PERMISSION_DENIED" >&2; exit 1; }
    echo "$now"
    if [[ $now != ACTIVE ]]; then  # what ran there has ended, and the disks are gone
      for pid in "$CLOUD"/host*/llave/train.pid; do
        [[ ! -e $pid ]] || kill -TERM "$(cat "$pid")" 2>/dev/null
      done
      # Again while a process that is ending still writes there.
      until rm -rf "$CLOUD"/host* 2>/dev/null; do sleep .02; done
    fi
    ;;
  "tpu-vm scp")
    for host in 0 1; do mkdir -p "$CLOUD/host$host"; cp "$5" "$CLOUD/host$host/"; done
    ;;
  "tpu-vm ssh")
    for argument; do
      [[ $argument != --command=* ]] || command=${argument#--command=}
      [[ $argument != --worker=* ]] || worker=${argument#--worker=}
    done
    [[ $worker != all ]] || worker="0 1"
    for host in $worker; do
      mkdir -p "$CLOUD/host$host"
      (cd "$CLOUD/host$host" && HOME=$PWD bash -c "$command") || exit
    done
    ;;
esac
"""
# uv on the host: the environment's Python is the script that stands for a training.
UV = """
if [[ $1 == venv ]]; then
  mkdir -p .venv/bin
  cp "$CLOUD/training" .venv/bin/python
fi
"""


class TestTpuVm:
    """From asking for a slice to the end of the run, on a cloud of two folders."""

    SCRIPT = ROOT / "launch/tpu_vm.sh"

    def run(self, folder, states, training, arguments=("--config", "configs/tpu_v4.py:2b")):
        cloud = folder / "cloud"
        cloud.mkdir(exist_ok=True)
        (cloud / "states").write_text("".join(f"{state}\n" for state in states))
        stand_in(cloud, "training", training)
        stand_in(folder / "bin", "gcloud", GCLOUD)
        stand_in(folder / "bin", "uv", UV)
        slice_ = {"NAME": "llave", "ZONE": "zone-b", "TYPE": "v4-16", "VERSION": "some-base"}
        settings = {"CLOUD": str(cloud), "POLL": ".05", "PAUSE": "0", **slice_}
        done = subprocess.run(
            [self.SCRIPT, "--spot", "--", *arguments],
            env=environment(folder / "bin", **settings),
            capture_output=True,
            text=True,
            timeout=120,
        )
        return done, (cloud / "calls").read_text().splitlines()

    def test_queues_sets_up_and_trains(self, tmp_path):
        training = 'printf "%s\\n" "$@" >arguments; sleep .2'
        arguments = ("--config", "configs/tpu_v4.py:2b", "--workdir", "bucket/a run")
        done, calls = self.run(
            tmp_path, ["NONE", "WAITING_FOR_RESOURCES", "ACTIVE"], training, arguments
        )
        assert done.returncode == 0, done.stderr
        assert "complete" in done.stderr
        (create,) = [call for call in calls if " create " in call]
        assert create == (
            "compute tpus queued-resources create llave --zone=zone-b --node-id=llave "
            "--accelerator-type=v4-16 --runtime-version=some-base --spot"
        )
        for host in ("host0", "host1"):
            home = tmp_path / "cloud" / host / "llave"
            # The committed state is there, and each host was told the whole command.
            assert (home / "llave_jax/train.py").exists()
            expected = ["-m", "llave_jax.train", "--distributed", *arguments]
            assert (home / "arguments").read_text().splitlines() == expected

    def test_what_is_copied_to_the_hosts_can_be_installed(self, tmp_path):
        command = re.search(r"git archive (?:.|\n)*? HEAD \\\n(.*?) &&", self.SCRIPT.read_text())
        for source in command[1].split():
            copy(source, tmp_path / (source if (ROOT / source).is_dir() else "."))
        assert_installs(tmp_path)

    def test_asks_again_for_a_slice_that_is_taken_away(self, tmp_path):
        training = 'echo >>"$CLOUD/starts"; (($(wc -l <"$CLOUD/starts") > 2)) || sleep 600'
        states = ["ACTIVE", "ACTIVE", "SUSPENDED", "NONE", "PROVISIONING", "ACTIVE"]
        done, calls = self.run(tmp_path, states, training)
        assert done.returncode == 0, done.stderr
        order = [c.split()[3] for c in calls if c.split()[3] in ("create", "delete", "scp")]
        assert order == ["scp", "delete", "create", "scp"]

    def test_looks_after_a_run_that_is_there(self, tmp_path):
        training = 'echo >>"$CLOUD/starts"; sleep 1'
        self.run(tmp_path, ["ACTIVE"], training)
        done, calls = self.run(tmp_path, ["ACTIVE"], training)
        assert done.returncode == 0
        assert sum(" scp " in call for call in calls) == 1

    def test_a_run_that_fails_is_shown(self, tmp_path):
        training = "sleep .5; echo config.data.path: no such folder; exit 1"
        done, _ = self.run(tmp_path, ["ACTIVE"], training)
        assert done.returncode == 1
        assert "exit status 1" in done.stderr
        assert "config.data.path: no such folder" in done.stdout

    @pytest.mark.parametrize("state", ["DENIED", "FAILED"])
    def test_mistakes_end_it(self, tmp_path, state):
        done, calls = self.run(tmp_path, [state], "")
        assert done.returncode == 1
        assert state in done.stderr
        assert not any(" create " in call for call in calls)


class TestDockerfile:
    FILE = ROOT / "Dockerfile"

    def instructions(self):
        text = re.sub(r"^\s*#.*\n", "", self.FILE.read_text(), flags=re.M).replace("\\\n", " ")
        return [tuple(line.split(maxsplit=1)) for line in text.splitlines() if line.strip()]

    def test_hadolint(self):
        command = [linter("hadolint"), "--failure-threshold", "style", self.FILE]
        checked = subprocess.run(command, capture_output=True, text=True)
        assert checked.returncode == 0, checked.stdout

    def test_what_is_copied_is_there_and_not_ignored(self):
        kept = re.findall(r"^!(.+)$", (ROOT / ".dockerignore").read_text(), flags=re.M)
        assert (ROOT / ".dockerignore").read_text().count("\n*\n") == 1
        sources = [
            s for name, value in self.instructions() if name == "COPY" for s in value.split()[:-1]
        ]
        assert sources
        for source in sources:
            assert (ROOT / source).exists(), source
            assert source.split("/")[0] in kept, source

    def test_the_package_can_be_installed_from_what_is_copied_before(self, tmp_path):
        for name, value in self.instructions():
            if name == "RUN" and "pip install" in value:
                break
            if name == "COPY":
                *sources, target = value.split()
                for source in sources:
                    copy(source, tmp_path / target)
        assert_installs(tmp_path)

    def test_base_suits_the_package(self):
        arguments = dict(v.partition("=")[::2] for n, v in self.instructions() if n == "ARG")
        base = dict(self.instructions())["FROM"]
        assert re.fullmatch(r"python:\$\{PYTHON\}-[a-z]+-[a-z]+", base), "a tag, not what is latest"
        version = tuple(map(int, arguments["PYTHON"].split(".")))
        lowest = re.fullmatch(r">=(\d+)\.(\d+)", PROJECT["requires-python"])
        assert version >= tuple(map(int, lowest.groups()))

    def test_runs_as_a_user_of_its_own(self):
        arguments = dict(v.partition("=")[::2] for n, v in self.instructions() if n == "ARG")
        users = [value for name, value in self.instructions() if name == "USER"]
        assert users == ["${RUN_AS}"]
        assert arguments["RUN_AS"] == "llave"

    def test_extras_exist(self):
        asked = re.findall(r"EXTRAS=([a-z,]+)", self.FILE.read_text() + PAGE)
        assert asked
        assert {extra for list_ in asked for extra in list_.split(",")} <= set(
            PROJECT["optional-dependencies"]
        )
