# What `./train.sh --demo stage3` runs: a tiny x4 upscaler, which makes 64 px out of 16 px, learns the look of a new
# subject. The validation sheets show low resolution, bicubic, the model's and the original side by side.
export MODEL_TYPE="deepfloyd-stage3-lora"
export MODEL_NAME="examples/demo/stage3"
export DATALOADER_CONFIG="examples/demo/multidatabackend-stage3.json"
# A folder of its own for each demo, so that each starts anew; what is cached serves the next one too.
export OUTPUT_DIR="output/demo-stage3/$(date +%Y-%m-%d-%H%M%S)"
export CACHE_DIR="output/demo-stage3/cache"
export CHECKPOINTING_STEPS=300
export CHECKPOINTING_LIMIT=1

# A real one makes 1024 px out of 256 px, and is trained on pieces of 512 px.
export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export TRAIN_BATCH_SIZE=8
export MAX_NUM_STEPS=300

export LORA_RANK=16
export LORA_TARGETS="attention+conv"
export LEARNING_RATE=5e-3
export LEARNING_RATE_END=0
export LR_WARMUP_STEPS=10
export MIXED_PRECISION="no"

export NUM_EVAL_IMAGES=4
export VALIDATION_RESOLUTION=64
export VALIDATION_GUIDANCE=1
export VALIDATION_NUM_INFERENCE_STEPS=10
export VALIDATION_STEPS=0
