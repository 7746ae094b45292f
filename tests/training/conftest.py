"""What several tests of training run on."""

import pytest

from tests.training.text_runs import write_place


@pytest.fixture(scope="session")
def place(golden, tmp_path_factory):
    """Model, data and benchmark of `text_runs`, and copies of them elsewhere."""
    root = tmp_path_factory.mktemp("place")
    write_place(root, golden / "checkpoint")
    return root
