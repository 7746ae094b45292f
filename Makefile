.PHONY: setup test lint format quickstart

setup:  ## the package with everything that its tests and checks need, and the hooks of git
	pip install -e '.[dev]'
	pre-commit install

test:  ## the fast suite; `pytest -m slow` runs the rest
	pytest -q

lint:  ## what CI checks besides tests
	ruff check .
	ruff format --check .
	lint-imports
	pyright

format:
	ruff check --fix .
	ruff format .

quickstart:  ## train a tiny model on handwritten digits, on any CPU
	python -m llave_jax.train --config configs/quickstart.py --workdir runs/quickstart
