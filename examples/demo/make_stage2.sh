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
[ -d "$work/painted" ] || "$PYTHON" -m examples.demo.draw "$work/painted" --kind painted --count 3200 --seed 7 --edges 66 80
[ -d "$work/painted-large" ] ||
    "$PYTHON" -m examples.demo.draw "$work/painted-large" --kind painted --count 800 --seed 8 --edges 120 288
[ -d "$work/untrained2" ] || "$PYTHON" -m examples.demo.make_model "$work/untrained2" --stage 2
# Twice, so that the learning rate rises and falls once more.
./train.sh --demo stage2-base --max_train_steps=2500
./train.sh --demo stage2-base
# Once more beside things of any colour, of which their captions say nothing: so it takes colours from what it is shown.
./train.sh --demo stage2-base --pretrained_model_name_or_path="$work/stage2/pipeline" --output_dir="$work/stage2-painted" \
    --data_backend_config=examples/demo/multidatabackend-painted.json --max_train_steps=700 --learning_rate=1e-3 \
    --lr_warmup_steps=30
rm -rf examples/demo/stage2
cp -R "$work/stage2-painted/pipeline" examples/demo/stage2
rm -rf examples/demo/stage2/README.md examples/demo/stage2/sample_images  # the card of a training of one's own
