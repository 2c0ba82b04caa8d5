# How the demo's own stage II was trained: ./examples/demo/make_stage2.sh prepares its data, then runs this.
# It learns on pictures of 64 px and on pieces of larger ones, from 16 px; so it can make 256 px from 64 px, too.
export MODEL_TYPE="deepfloyd-stage2"
export MODEL_NAME="examples/demo/work/untrained2"
export DATALOADER_CONFIG="examples/demo/multidatabackend-stage2-base.json"
export OUTPUT_DIR="examples/demo/work/stage2"
export CACHE_DIR="examples/demo/work/cache"

export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export CAPTION_STRATEGY="textfile"
export TRAIN_BATCH_SIZE=16
export MAX_NUM_STEPS=4000

# Offset noise hides the brightness of x_t, so that the model learns to take it from the low-resolution image.
export NOISE_OFFSET=0.1
export MIN_SNR_GAMMA=2
# The variance moves far too slowly for so few steps: sampling has fixed_small instead.
export TRAIN_VARIANCE=false
export LEARNING_RATE=2e-3
export LEARNING_RATE_END=0
export LR_SCHEDULE="cosine"
export LR_WARMUP_STEPS=100
export ADAM_BETA2=0.99
# The weights stay in fp32; only the computation is bf16.
export MIXED_PRECISION="bf16"

export CHECKPOINTING_STEPS=250
export CHECKPOINTING_LIMIT=2
export NUM_EVAL_IMAGES=2
export VALIDATION_RESOLUTION=64,256
export VALIDATION_STEPS=1000
export VALIDATION_NUM_INFERENCE_STEPS=50
export VALIDATION_GUIDANCE=1
