"""Tests of the server need the extra `serve`; without it they are not collected."""

import importlib.util

import pytest

NEEDED = ("starlette", "uvicorn", "prometheus_client", "httpx")
if not all(map(importlib.util.find_spec, NEEDED)):
    collect_ignore_glob = ["test_*.py"]


@pytest.fixture
def serve():
    """serve(...) -> an `InProcess` with these settings."""
    from tests.serving.in_process import InProcess

    servers = []

    def serve(*arguments, **options):
        servers.append(InProcess(*arguments, **options))
        return servers[-1]

    yield serve
    for server in servers:
        server.batcher.close(0.0)
