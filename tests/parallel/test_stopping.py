"""What signals do to a process: real signals to real processes, in each state that it may be in."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

# The process says where it is, and then stays there. The last words are what it has done.
SCRIPT = """
import hashlib, sys, threading, time
from llave_jax.common import interrupts
from llave_jax.parallel import stopping
state = sys.argv[1]
stopping.GRACE, stopping.DATA_LIMIT, interrupts.REPEAT = 0.5, 0.5, 0.05


def say(text):
    print(text, flush=True)


with stopping.listen() as stop:
    if state == "steps":
        for step in range(1, 10**6):
            if step == 3:
                say("ready")
            time.sleep(0.01)
            if stop.at(step):
                break
        say(f"saved, a signal stopped it: {stop.number is not None}")
    elif state == "python":
        try:
            with stop.interruptible():
                say("ready")
                time.sleep(600)
        except stopping.StopRequested:
            say("left")
    elif state == "swallowed":
        try:
            with stop.interruptible():
                say("ready")
                try:
                    time.sleep(600)
                except BaseException:
                    pass
        except stopping.StopRequested:
            say("left")
    elif state == "library":
        with stop.interruptible(lambda: say("waited")):
            # A thread says so, while this one does not come back to Python for many minutes.
            threading.Timer(0.5, say, ["ready"]).start()
            hashlib.pbkdf2_hmac("sha512", b"", b"", 2**31 - 1)
    elif state == "data":
        with stop.waiting_for_data():
            say("ready")
            time.sleep(600)
    elif state == "save":
        stop.at(1)
        say("ready")
        time.sleep(600)
sys.exit(stop.status)
"""
# State -> signals, last words, exit status.
CASES = {
    "steps": ([signal.SIGTERM], "saved, a signal stopped it: True", 143),
    "python": ([signal.SIGINT], "left", 130),
    "swallowed": ([signal.SIGTERM], "left", 143),
    "library": ([signal.SIGINT], "waited", 130),
    "data": ([signal.SIGTERM], "ready", 143),
    # While something is saved, only a second signal ends it.
    "save": ([signal.SIGTERM, signal.SIGINT], "ready", 143),
}


@pytest.fixture(scope="module")
def ended():
    """State -> (exit status, last words, stderr); all processes at once."""
    options = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    root = Path(__file__).parents[2]
    jobs = {
        state: subprocess.Popen([sys.executable, "-c", SCRIPT, state], cwd=root, **options)
        for state in CASES
    }
    found = {}
    try:
        for state, job in jobs.items():
            assert job.stdout.readline() == "ready\n", job.stderr.read()
            first, *more = CASES[state][0]
            job.send_signal(first)
            if more:
                # The first one is taken once the process says so; the second one comes later than REPEAT.
                assert "a second one ends it" in job.stderr.readline()
                with pytest.raises(subprocess.TimeoutExpired):
                    job.wait(0.3)
                job.send_signal(*more)
        for state, job in jobs.items():
            words, errors = job.communicate(timeout=100)
            found[state] = job.returncode, ("ready\n" + words).splitlines()[-1], errors
    finally:
        for job in jobs.values():
            job.kill()
    return found


@pytest.mark.parametrize("state", CASES)
def test_a_signal_ends_the_process_as_its_state_allows(state, ended):
    _, words, status = CASES[state]
    assert ended[state][:2] == (status, words), ended[state][2]
    assert "Traceback" not in ended[state][2]


def test_a_second_signal_says_so(ended):
    assert "SIGINT came again: ended at once" in ended["save"][2]
