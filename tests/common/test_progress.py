"""Progress of long work where stderr is no terminal: one plain line at the end."""

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
