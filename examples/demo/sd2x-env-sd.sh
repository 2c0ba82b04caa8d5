# What `./train.sh --demo sd` runs: it teaches a tiny Stable Diffusion, which knows circles, squares, triangles and
# crosses in four colours, what a purple heart is.
export MODEL_TYPE="lora"
export MODEL_FAMILY="sd"
export MODEL_NAME="examples/demo/sd"
export DATALOADER_CONFIG="examples/demo/multidatabackend-sd.json"
# A folder of its own for each demo, so that each starts anew; what is cached serves the next one too.
export OUTPUT_DIR="output/demo-sd/$(date +%Y-%m-%d-%H%M%S)"
export CACHE_DIR="output/demo-sd/cache"
export CHECKPOINTING_STEPS=100
export CHECKPOINTING_LIMIT=1

# A real one makes 512 px or 768 px.
export RESOLUTION=128
export RESOLUTION_TYPE="pixel"
export TRAIN_BATCH_SIZE=8
export MAX_NUM_STEPS=300

export LORA_RANK=16
export LORA_ALPHA=32
export LORA_TARGETS="attention+conv"
export LEARNING_RATE=5e-3
export LEARNING_RATE_END=0
export LR_WARMUP_STEPS=10
export MIXED_PRECISION="no"
# As its base was trained: see sd2x-env-sd-base.sh.
export MIN_SNR_GAMMA=1

export USER_PROMPT_LIBRARY="examples/demo/prompts.json"
export VALIDATION_RESOLUTION=128
export VALIDATION_GUIDANCE=3
export VALIDATION_NUM_INFERENCE_STEPS=25
export VALIDATION_STEPS=0
