#!/usr/bin/env bash
# Make the demo's stage II again from nothing, as make_base.sh makes its stage I. An hour on one core;
# interrupted, the same command goes on.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. helpers/environment.sh
need_python
work=examples/demo/work
[ -d "$work/known" ] || "$PYTHON" -m examples.demo.draw "$work/known" --kind known --count 6400 --seed 1 --edges 66 80
[ -d "$work/large" ] || "$PYTHON" -m examples.demo.draw "$work/large" --kind known --count 1600 --seed 5 --edges 120 288
[ -d "$work/untrained2" ] || "$PYTHON" -m examples.demo.make_model "$work/untrained2" --stage 2
# Twice, so that the learning rate rises and falls once more.
./train.sh --demo stage2-base --max_train_steps=2500
./train.sh --demo stage2-base
rm -rf examples/demo/stage2
cp -R "$work/stage2/pipeline" examples/demo/stage2
