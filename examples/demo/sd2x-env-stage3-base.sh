# How the demo's own stage III was trained: ./examples/demo/make_stage3.sh makes its data and its VAE, and runs this three times.
# It learns on pictures of 64 px and on pieces of up to 128 px of larger ones; so it can make 1024 px from 256 px, too.
export MODEL_TYPE="deepfloyd-stage3"
export MODEL_NAME="examples/demo/work/untrained-stage3"
export DATALOADER_CONFIG="examples/demo/multidatabackend-stage3-base.json"
export OUTPUT_DIR="examples/demo/work/stage3-1"
export CACHE_DIR="examples/demo/work/cache"

export RESOLUTION=64
export RESOLUTION_TYPE="pixel"
export CAPTION_STRATEGY="textfile"
export TRAIN_BATCH_SIZE=16
export MAX_NUM_STEPS=2700

export LEARNING_RATE=2e-3
export LEARNING_RATE_END=0
export LR_SCHEDULE="cosine"
export LR_WARMUP_STEPS=100
export ADAM_BETA2=0.99
export MIXED_PRECISION="no"

export CHECKPOINTING_STEPS=250
export CHECKPOINTING_LIMIT=2
export NUM_EVAL_IMAGES=2
export VALIDATION_RESOLUTION=64,256
export VALIDATION_STEPS=900
export VALIDATION_NUM_INFERENCE_STEPS=10
export VALIDATION_GUIDANCE=1
