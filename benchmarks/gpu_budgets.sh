#!/bin/sh
# What latency budgets take on one GPU, as the networks are, compiled, and recorded as CUDA graphs; twelve minutes at most:
#   sh benchmarks/gpu_budgets.sh
# A dry run without one, of a tiny shape and without graphs:
#   sh benchmarks/gpu_budgets.sh cpu tiny
set -e
device=${1:-cuda}
shapes=${2:-"smollm2-135m llama-2-7b"}
dtype=bfloat16
modes="eager compile graphs"
prompt=1024
if [ "$device" = cpu ]; then
  dtype=float32 modes="eager compile" prompt=64
fi
for shape in $shapes; do
  for mode in $modes; do
    option=--$mode
    if [ $mode = eager ]; then option=; fi
    for batch in 1 16; do
      python benchmarks/latency.py --device $device --dtype $dtype --shape "$shape" --batch_size $batch --quarters $option \
        --prompt_tokens $prompt --seconds 8 --held_out 4 --targets 0.8 0.6 0.4
    done
  done
done
