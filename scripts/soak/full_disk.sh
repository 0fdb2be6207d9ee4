#!/usr/bin/env bash
# A disk that fills up: exit code 4; with more room the same command finishes. Needs the right to mount a tmpfs.
#   bash scripts/soak/full_disk.sh path/to/model [python]
set -euo pipefail
model=$1 python=${2:-python}
disk=$(mktemp -d)
trap 'umount "$disk"; rmdir "$disk"' EXIT
mount -t tmpfs -o size=64k tmpfs "$disk"
for workers in 1 2; do
  for size in 200k 1m 3m 5m; do
    mount -o "remount,size=$size" "$disk"
    code=0
    "$python" -m loftq_cli quantize "$model" -o "$disk/out" --bits 2 --rank 8 --num-processes "$workers" --quiet || code=$?
    [ "$code" = 4 ] && [ ! -e "$disk/out/config.json" ] || { echo "$workers worker(s), $size: exit $code"; exit 1; }
  done
  mount -o remount,size=64m "$disk"
  "$python" -m loftq_cli quantize "$model" -o "$disk/out" --bits 2 --rank 8 --num-processes "$workers" --quiet
  "$python" -m loftq_cli verify "$disk/out" --source "$model"
  rm -r "$disk/out"
done
