#!/usr/bin/env bash
# Run all tests, or those that are named: ./tests/run.sh [pytest's words ...]. Sets up Python like train.sh does.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. helpers/environment.sh
need_python || exit
exec "$PYTHON" -m pytest "$@"
