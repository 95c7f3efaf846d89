#!/usr/bin/env bash
# The training and analysis commands of the pages that whence repeats (GLUE, SWAG, WikiText), in whence's form, on small data and a
# small model. Linear datamodeling scores and removal of rows take real banks: finetune_lds.py, and docs/results/finetuned.md.
#
#   WHENCE_DATA=FOLDER bench/seed_commands.sh OUT [PRETRAINED_ENCODER]
#
# OUT gets checkpoints, runs, pictures and log.txt. Sizes are for 2 CPU cores; without the limits and with --model instead of
# --preset these are the published runs. With a folder of a pretrained encoder, RTE is trained on it as well.
set -euo pipefail
ENCODER=${2:+$(realpath "$2")}
if [ -n "${WHENCE_DATA:-}" ]; then export WHENCE_DATA=$(realpath "$WHENCE_DATA"); fi
mkdir -p "$1"
cd "$1"
say() { echo "== whence $*" | tee -a log.txt; whence "$@" 2>&1 | tee -a log.txt; }

# GLUE & BERT: train, analyse with every strategy, half precision
say train glue --task sst2 --preset small --checkpoint-dir sst2 --train-batch-size 32 --eval-batch-size 32 --weight-decay 0.01 \
    --num-train-epochs 3 --seed 1004 --max-train-rows 400 --max-query-rows 100 --max-length 32
GLUE=(glue --checkpoint-dir sst2 --run-dir runs/sst2)
for strategy in diagonal kfac ekfac; do
    say fit "${GLUE[@]}" --strategy $strategy --batch-size 128
done
for strategy in identity diagonal kfac ekfac; do
    say score "${GLUE[@]}" --strategy $strategy --query-batch-size 175 --batch-size 128
done
say fit glue --checkpoint-dir sst2 --run-dir runs/sst2_half --strategy ekfac --precision bfloat16
say score glue --checkpoint-dir sst2 --run-dir runs/sst2_half --strategy ekfac --precision bfloat16
say evaluate agreement runs/sst2/scores/ekfac runs/sst2_half/scores/ekfac --plot half_precision.png
say top "${GLUE[@]}" --strategy ekfac --query 79 --k 1
say self "${GLUE[@]}" --k 3

# SWAG & RoBERTa: half precision and low rank
say train swag --task hellaswag --preset small --checkpoint-dir swag --train-batch-size 16 --eval-batch-size 32 --weight-decay 0.001 \
    --num-train-epochs 3 --seed 1004 --max-train-rows 100 --max-query-rows 30 --max-length 32
SWAG=(swag --checkpoint-dir swag --run-dir runs/swag)
say fit "${SWAG[@]}" --strategy ekfac --precision bfloat16
say score "${SWAG[@]}" --strategy ekfac --precision bfloat16 --query-rank 32 --query-batch-size 100 --batch-size 128
say top "${SWAG[@]}" --strategy ekfac --query 0 --k 1

# WikiText & GPT-2: the seed's layers, half precision, torch.compile, per token
say train wikitext --preset small --checkpoint-dir wikitext --train-batch-size 8 --eval-batch-size 16 --weight-decay 0.01 \
    --num-train-epochs 1 --seed 1004 --max-train-rows 200 --max-query-rows 30 --max-length 64
TEXT=(wikitext --checkpoint-dir wikitext)
say fit "${TEXT[@]}" --run-dir runs/wikitext --layers seed --strategy ekfac
for strategy in identity ekfac; do
    say score "${TEXT[@]}" --run-dir runs/wikitext --layers seed --strategy $strategy
done
say fit "${TEXT[@]}" --run-dir runs/wikitext_half --layers seed --precision bfloat16
say score "${TEXT[@]}" --run-dir runs/wikitext_half --layers seed --precision bfloat16 --strategy ekfac
say evaluate agreement runs/wikitext/scores/ekfac runs/wikitext_half/scores/ekfac
say fit "${TEXT[@]}" --run-dir runs/wikitext_compiled --layers seed --compile
say score "${TEXT[@]}" --run-dir runs/wikitext_compiled --layers seed --compile --strategy ekfac
say score "${TEXT[@]}" --run-dir runs/wikitext --layers seed --strategy ekfac --per-token --name by-token --query-rows 5
say top "${TEXT[@]}" --run-dir runs/wikitext --strategy ekfac --query 0 --k 1
say evaluate tail-patch "${TEXT[@]}" --run-dir runs/wikitext --layers seed --scores ekfac,identity --learning-rate 0.0001

if [ -n "$ENCODER" ]; then # the same on a pretrained encoder
    say train glue --task rte --model "$ENCODER" --checkpoint-dir rte --learning-rate 2e-5 --weight-decay 0.01 --num-train-epochs 1 --seed 0 \
        --train-batch-size 32 --max-train-rows 100 --max-query-rows 40 --max-length 64
    RTE=(glue --checkpoint-dir rte --run-dir runs/rte)
    say fit "${RTE[@]}" --strategy ekfac
    say score "${RTE[@]}" --strategy ekfac --query-batch-size 70 --batch-size 128
    say top "${RTE[@]}" --strategy ekfac --query 0 --k 1
    say score "${RTE[@]}"
    say evaluate agreement runs/rte/scores/ekfac runs/rte/scores/over-run
fi
