#!/usr/bin/env bash
# Run all tests, or those that are named: ./tests/run.sh [pytest's words ...]. Sets up Python like train.sh does.
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit
. helpers/environment.sh
need_python || exit
# A process for each core, each computing on its own: more threads than cores make all of them many times slower.
export OMP_NUM_THREADS="${OMP_NUM_THREADS:-1}"
exec "$PYTHON" -m pytest --numprocesses=logical --dist=loadfile --no-loadscope-reorder "$@"
