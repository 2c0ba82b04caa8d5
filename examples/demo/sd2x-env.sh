# What `./train.sh --demo` runs: it teaches a tiny stage I, which knows circles, squares, triangles and crosses in four
# colours, what a purple heart is. A copy of it is a good start for a model of your own: see sd2x-env.sh.example.
export MODEL_TYPE="deepfloyd-lora"
export MODEL_NAME="examples/demo/model"
export DATALOADER_CONFIG="examples/demo/multidatabackend.json"
# A folder of its own for each demo, so that each starts anew; what is cached serves the next one too.
export OUTPUT_DIR="output/demo/$(date +%Y-%m-%d-%H%M%S)"
export CACHE_DIR="output/demo/cache"
export CHECKPOINTING_STEPS=100
export CHECKPOINTING_LIMIT=1

export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export TRAIN_BATCH_SIZE=8
export MAX_NUM_STEPS=300

export LORA_RANK=16
export LORA_ALPHA=32
export LORA_TARGETS="attention+conv"
# A tiny model takes large steps: for a real one, see docs/deepfloyd.md.
export LEARNING_RATE=5e-3
export LEARNING_RATE_END=0
export LR_WARMUP_STEPS=10
export MIXED_PRECISION="no"
# A new shape is learned where there is little but noise, and the plain loss is smallest there.
export MIN_SNR_GAMMA=0.5
export TIMESTEP_BIAS_STRATEGY="later"
export TIMESTEP_BIAS_PORTION=0.4
export TIMESTEP_BIAS_MULTIPLIER=6

export USER_PROMPT_LIBRARY="examples/demo/prompts.json"
export VALIDATION_RESOLUTION=64
export VALIDATION_GUIDANCE=1.5
export VALIDATION_NUM_INFERENCE_STEPS=25
export VALIDATION_STEPS=0
