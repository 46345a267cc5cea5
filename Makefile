# What contributors and CI run. `./setup_llm.sh test` installs what these need and calls them.
PY := .venv/bin/python
BIN := .venv/bin

.PHONY: check lint types imports format generate screenshots lock

check: lint types imports  ## everything that reads the code without running it

lint:
	$(BIN)/ruff check .
	$(BIN)/ruff format --check .

types:
	$(BIN)/mypy

imports:
	cd backend && ../$(BIN)/lint-imports --config ../pyproject.toml

format:
	$(BIN)/ruff format .
	$(BIN)/ruff check --fix .

generate:  ## files that are made from the code
	cd backend && ../$(PY) -c "from app.config import *; EXAMPLE_FILE.write_text(env_example())"
	cd backend && ../$(PY) -m app.openapi > ../frontend/openapi.json
	npm --prefix frontend run --silent generate -- openapi.json --output src/client/schema.d.ts
	rm frontend/openapi.json

screenshots:  ## the README's pictures
	$(PY) -m pytest tests/e2e/test_screenshots.py --screenshots docs/images

lock:  ## pin what pyproject.toml allows
	$(BIN)/uv pip compile --universal --no-header pyproject.toml -o backend/requirements.txt
	$(BIN)/uv pip compile --universal --no-header -c backend/requirements.txt --extra llm pyproject.toml -o backend/requirements-llm.txt
	$(BIN)/uv pip compile --universal --no-header -c backend/requirements.txt --extra node pyproject.toml -o backend/requirements-node.txt
	$(BIN)/uv pip compile --universal --no-header -c backend/requirements.txt --extra otel pyproject.toml -o backend/requirements-otel.txt
	$(BIN)/uv pip compile --universal --no-header -c backend/requirements.txt --extra dev --extra llm --extra otel pyproject.toml -o backend/requirements-dev.txt
	$(BIN)/uv pip compile --universal --no-header --python-version 3.11 tests/clients/requirements.in -o tests/clients/requirements.txt
	npm --prefix tests/clients install --package-lock-only
