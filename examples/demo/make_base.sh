#!/usr/bin/env bash
# Make the demo's stage I again from nothing: draw its pictures, make an untrained cascade, train all of it, and put the
# result where the demo looks for it. About half an hour on one core; interrupted, the same command goes on.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. helpers/environment.sh
need_python
work=examples/demo/work
[ -d "$work/known" ] || "$PYTHON" -m examples.demo.draw "$work/known" --kind known --count 6400 --seed 1 --edges 66 80
[ -d "$work/untrained" ] || "$PYTHON" -m examples.demo.make_model "$work/untrained"
./train.sh --demo base
rm -rf examples/demo/model
cp -R "$work/base/pipeline" examples/demo/model
rm -rf examples/demo/model/README.md examples/demo/model/sample_images  # the card of a training of one's own
