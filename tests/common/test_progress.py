"""Progress of long work where stderr is no terminal: a plain line now and then, and one at the end."""

import pytest

from llave_jax.common import progress


@pytest.mark.parametrize(
    ("done", "seconds", "rate"),
    [(15_500, 1.0, "15500/s"), (105, 1.0, "105/s"), (1, 3.0, "0.333/s")],
)
def test_rates_are_numbers_that_people_read(done, seconds, rate, monkeypatch, capsys):
    times = iter([0.0, seconds, seconds])
    monkeypatch.setattr(progress.time, "monotonic", lambda: next(times))
    with progress.Progress(done, "reading", unit="rows") as bar:
        bar.update(done)
    line = capsys.readouterr().err
    assert line.startswith(f"reading: {done} of {done} rows, {rate}, 0:0")


def test_what_was_slow_at_the_start_says_nothing_of_the_rest(monkeypatch, capsys):
    """The first of 100 steps takes 40 seconds, all others a second; 9 were done by an earlier run."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: now[0])
    with progress.Progress(109, "training", unit="steps", initial=9) as bar:
        for step in range(100):
            now[0] += 1.0 if step else 40.0
            bar.update(note=f"loss {step}")
            bar.update(0)
    lines = capsys.readouterr().err.splitlines()
    assert lines == [
        "training: 10 of 109 steps, 0.025/s, 1:06:00 left  loss 0",
        "training: 40 of 109 steps, 1/s, 1:09 left  loss 30",
        "training: 70 of 109 steps, 1/s, 0:39 left  loss 60",
        "training: 100 of 109 steps, 1/s, 0:09 left  loss 90",
        "training: 109 of 109 steps, 0.719/s, 2:19 in all",
    ]
