"""SIGTERM and Ctrl-C end a command: soon, without a traceback, with the status that shells know."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
# Started as a command is, with the body as its action.
COMMAND = """
import argparse, sys, time
sys.orig_argv[1:] = ["-m", "llave_jax.example"]
import llave_jax
from llave_jax.common import command_line, files, interrupts

interrupts.GRACE = 0.5
def say():
    print("ready", flush=True)
def action(args):
    {body}
if {importing}:
    say()
    time.sleep(60)
sys.exit(command_line.run(action, argparse.Namespace(verbose=False)))
"""
BODIES = {
    "in Python": """
    with files.staged_directory("out") as staged:
        say()
        time.sleep(60)""",
    "threads": """
    import concurrent.futures
    pool = concurrent.futures.ThreadPoolExecutor(2)
    futures = [pool.submit(time.sleep, 60) for _ in range(3)]
    say()
    futures[0].result()""",
    "not in Python": """
    import hashlib, threading
    threading.Timer(0.2, say).start()
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)""",
    "errors are caught": """
    say()
    while True:
        try:
            time.sleep(60)
        except Exception:
            pass""",
}


def start(body, folder, importing=False):
    process = subprocess.Popen(
        [sys.executable, "-c", COMMAND.format(body=body, importing=importing)],
        cwd=folder,
        env=os.environ | {"PYTHONPATH": str(ROOT)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
@pytest.mark.parametrize("where", BODIES)
def test_a_signal_ends_a_command(where, number, tmp_path):
    process = start(BODIES[where], tmp_path)
    process.send_signal(number)
    _, errors = process.communicate(timeout=30)
    assert process.returncode == 128 + number
    if where != "not in Python":
        assert errors == f"ended by {number.name}; the same command goes on or starts again\n"
    assert list(tmp_path.iterdir()) == []


def test_a_signal_while_modules_are_imported(tmp_path):
    processes = [start("pass", tmp_path, importing=True) for _ in range(2)]
    for process, number in zip(processes, (signal.SIGINT, signal.SIGTERM), strict=True):
        process.send_signal(number)
        assert process.communicate(timeout=30) == ("", "")
        assert process.returncode == 128 + number


def test_a_second_signal_ends_a_command_that_is_stuck(tmp_path):
    body = BODIES["not in Python"].replace("import", "interrupts.GRACE = 60; import")
    process = start(body, tmp_path)
    process.send_signal(signal.SIGTERM)
    time.sleep(0.5)
    assert process.poll() is None
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=30) == 128 + signal.SIGINT
