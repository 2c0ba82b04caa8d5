# How the demo's own Stable Diffusion was trained: ./examples/demo/make_sd_base.sh makes its data and its VAE, then runs it.
export MODEL_TYPE="full"
export MODEL_FAMILY="sd"
export MODEL_NAME="examples/demo/work/untrained-sd"
export DATALOADER_CONFIG="examples/demo/multidatabackend-sd-base.json"
export OUTPUT_DIR="examples/demo/work/sd"
export CACHE_DIR="examples/demo/work/cache"

export RESOLUTION=128
export RESOLUTION_TYPE="pixel"
export CAPTION_STRATEGY="textfile"
export TRAIN_BATCH_SIZE=16
export MAX_NUM_STEPS=2500

# Shapes are decided where there is more noise than picture, and there the plain loss is smallest.
export MIN_SNR_GAMMA=1

export LEARNING_RATE=2e-3
export LEARNING_RATE_END=0
export LR_SCHEDULE="cosine"
export LR_WARMUP_STEPS=200
export ADAM_BETA2=0.99
export MIXED_PRECISION="no"

export CHECKPOINTING_STEPS=500
export CHECKPOINTING_LIMIT=2
export USER_PROMPT_LIBRARY="examples/demo/prompts-base.json"
export VALIDATION_RESOLUTION=128
export VALIDATION_STEPS=500
export VALIDATION_GUIDANCE=3
