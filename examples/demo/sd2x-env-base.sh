# How the demo's own stage I was trained: ./examples/demo/make_base.sh prepares its data, then runs this.
export MODEL_TYPE="deepfloyd-full"
export MODEL_NAME="examples/demo/work/untrained"
export DATALOADER_CONFIG="examples/demo/multidatabackend-base.json"
export OUTPUT_DIR="examples/demo/work/base"
export CACHE_DIR="examples/demo/work/cache"

export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export CAPTION_STRATEGY="textfile"
export TRAIN_BATCH_SIZE=16
export MAX_NUM_STEPS=2000

# Shapes are decided where there is little but noise, and there the plain loss is smallest.
export MIN_SNR_GAMMA=0.5

export LEARNING_RATE=2e-3
export LEARNING_RATE_END=0
export LR_SCHEDULE="cosine"
export LR_WARMUP_STEPS=200
export ADAM_BETA2=0.99
# The weights stay in fp32; only the computation is bf16.
export MIXED_PRECISION="bf16"

export CHECKPOINTING_STEPS=500
export CHECKPOINTING_LIMIT=2
export USER_PROMPT_LIBRARY="examples/demo/prompts-base.json"
export VALIDATION_STEPS=500
export VALIDATION_GUIDANCE=1.5
