"""A short form of the torture: some kills, not a hundred. See `torture.py`."""

import pytest

from tests.torture import torture


@pytest.mark.slow
def test_a_run_that_is_killed_again_and_again_is_the_run_left_alone(tmp_path):
    # With this seed the processes live long: on two idle cores they were killed at steps 10, 14 and 29.
    outcome = torture.compare(tmp_path / "runs", kills=3, steps=40, seed=1303)
    # On a fast machine the run may be complete before the last of them.
    assert sum(outcome.kills.values()) >= 2
    assert outcome.differences == []


def test_differences_are_found(tmp_path):
    """Of metrics, and of what is left behind; without this the comparison could see nothing."""
    for name, loss in (("one", 1.0), ("other", 2.0)):
        run = tmp_path / name
        for part in ("checkpoints", "best/checkpoints", "tensorboard"):
            (run / part).mkdir(parents=True)
        (run / "best" / "best.json").write_text('{"step": 1}')
        (run / "metrics.jsonl").write_text(f'{{"step": 1, "time": {loss}, "loss": {loss}}}\n')
    (tmp_path / "other" / ".digits.1.partial").mkdir()
    found = torture.differences(tmp_path / "one", tmp_path / "other")
    assert [line.partition(":")[0] for line in found] == ["metrics.jsonl", "files", "left behind"]
