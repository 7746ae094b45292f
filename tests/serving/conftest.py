"""Tests of the server need the extra `serve`; without it they are not collected."""

import importlib.util

NEEDED = ("starlette", "uvicorn", "prometheus_client", "httpx")
if not all(map(importlib.util.find_spec, NEEDED)):
    collect_ignore_glob = ["test_*.py"]
