#!/usr/bin/env bash
# Make the demo's stage III again from nothing, as make_sd_base.sh makes its Stable Diffusion: first its VAE learns, then
# its UNet, then the VAE's decoder once more. An hour on one core; interrupted, the same command goes on.
set -e
cd "$(dirname "${BASH_SOURCE[0]}")/../.."
. helpers/environment.sh
need_python
work=examples/demo/work
[ -d "$work/known" ] || "$PYTHON" -m examples.demo.draw "$work/known" --kind known --count 6400 --seed 1 --edges 66 80
[ -d "$work/large" ] || "$PYTHON" -m examples.demo.draw "$work/large" --kind known --count 1600 --seed 5 --edges 120 288
[ -d "$work/huge" ] || "$PYTHON" -m examples.demo.draw "$work/huge" --kind known --count 320 --seed 6 --edges 500 1150
# Things of any colour, of which their captions say nothing: so it takes colours from what it is shown.
[ -d "$work/painted" ] || "$PYTHON" -m examples.demo.draw "$work/painted" --kind painted --count 3200 --seed 7 --edges 66 80
[ -d "$work/painted-large" ] ||
    "$PYTHON" -m examples.demo.draw "$work/painted-large" --kind painted --count 800 --seed 8 --edges 120 288
[ -d "$work/painted-huge" ] ||
    "$PYTHON" -m examples.demo.draw "$work/painted-huge" --kind painted --count 160 --seed 9 --edges 500 1150
if [ ! -d "$work/untrained-stage3" ]; then
    rm -rf "$work/new-stage3"
    "$PYTHON" -m examples.demo.make_stage3 "$work/new-stage3"
    "$PYTHON" -m examples.demo.train_vae "$work/new-stage3" --any-colour --edge 64 --steps 5000 --pieces-of 384 \
        --scaling-factor 0.08333
    mv "$work/new-stage3" "$work/untrained-stage3"
fi
model="$work/untrained-stage3"
for turn in 1 2 3; do # so that the learning rate rises and falls once more
    ./train.sh --demo stage3-base --pretrained_model_name_or_path="$model" --output_dir="$work/stage3-$turn"
    model="$work/stage3-$turn/pipeline"
done
rm -rf examples/demo/stage3
cp -R "$model" examples/demo/stage3
rm -rf examples/demo/stage3/README.md examples/demo/stage3/sample_images  # the card of a training of one's own
"$PYTHON" -m examples.demo.train_vae examples/demo/stage3 --any-colour --decoder-alone --edge 128 --batch 4 \
    --pieces-of 1024 --learning-rate 1e-3 --steps 2600
