#!/usr/bin/env bash
# Make the demo's Stable Diffusion again from nothing, as make_base.sh makes its stage I: first its VAE learns, then its
# UNet. Half an hour on one core; interrupted, the same command goes on.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. helpers/environment.sh
need_python
work=examples/demo/work
[ -d "$work/known128" ] ||
    "$PYTHON" -m examples.demo.draw "$work/known128" --kind known --count 6400 --seed 1 --edges 132 160
if [ ! -d "$work/untrained-sd" ]; then
    rm -rf "$work/new-sd"
    "$PYTHON" -m examples.demo.make_sd "$work/new-sd"
    "$PYTHON" -m examples.demo.train_vae "$work/new-sd"
    mv "$work/new-sd" "$work/untrained-sd"
fi
./train.sh --demo sd-base
rm -rf examples/demo/sd
cp -R "$work/sd/pipeline" examples/demo/sd
rm -rf examples/demo/sd/README.md examples/demo/sd/sample_images  # the card of a training of one's own
