#!/usr/bin/env bash
# Every GPU test and benchmark, on a machine with one GPU that reaches no network and has torch and the common libraries.
#
#     benchmarks/gpu.sh pack [3.12]    with a network: what such a machine lacks, for its Python, into .gpu/site.tar.xz
#     benchmarks/gpu.sh run            there, beside that .gpu/: tests, then tables, each into $OUT or .gpu/results/, and all
#                                      of them as one section of benchmarks/RESULTS.md, there and beside the tables
#     benchmarks/gpu.sh record         that section alone, of the tables that are there
#
# A wheel of flash-attn for the machine's torch may be unpacked into .gpu/flash; without it torch's own kernel is used.
set -euo pipefail
cd "$(dirname "$0")/.."
lacking=(annotated-types datasets deepspeed dill hjson jsonschema jsonschema-specifications multiprocess peft pydantic
  pydantic-core ray referencing rpds-py tenacity tensorboardx transformers trl typing-inspection)

pack() {
  rm -rf .gpu/site && mkdir -p .gpu/site
  local wanted=() name
  for name in "${lacking[@]}"; do
    wanted+=("$(grep -iE "^${name/-/[-_]}==" constraints.txt)")
  done
  wanted+=("liger-kernel==0.8.5") # no dependency of a machine without a GPU, so that no constraint names it
  python3 -m pip wheel --quiet --no-deps --wheel-dir .gpu/wheels "$(grep -i '^deepspeed==' constraints.txt)"
  python3 -m pip wheel --quiet --no-deps --wheel-dir .gpu/wheels "$(grep -i '^hjson==' constraints.txt)"
  python3 -m pip install --quiet --no-deps --only-binary=:all: --python-version "$1" --implementation cp \
    --platform manylinux_2_28_x86_64 --platform manylinux_2_17_x86_64 --platform manylinux2014_x86_64 \
    --find-links .gpu/wheels --target .gpu/site "${wanted[@]}"
  # What Ray has for other purposes than ours is most of it.
  (cd .gpu/site/ray && rm -rf jars rllib llm serve dashboard/client)
  find .gpu/site -name '*.so*' -o -path '*/ray/core/src/ray/*' -type f -perm -u+x | xargs -r strip --strip-unneeded 2>/dev/null || true
  find .gpu/site -name __pycache__ -o -name tests -path '*transformers*' | xargs rm -rf
  mkdir -p .gpu/site/burnish-0.dist-info
  printf 'Metadata-Version: 2.1\nName: burnish\nVersion: %s\n' \
    "$(sed -n 's/^version = "\(.*\)"/\1/p' pyproject.toml)" > .gpu/site/burnish-0.dist-info/METADATA
  tar -C .gpu -cJf .gpu/site.tar.xz site
  rm -rf .gpu/site .gpu/wheels
  du -h .gpu/site.tar.xz
}

run() {
  local place results=${OUT:-.gpu/results}
  place=$(mktemp -d)
  trap 'rm -rf "$place"' EXIT
  mkdir -p "$results"
  tar -C "$place" -xJf .gpu/site.tar.xz
  find "$place/site/ray/core" -type f -exec chmod +x {} +
  export PYTHONPATH="$place/site:$PWD/.gpu/flash:$PWD/platform:$PWD"
  # Unbuffered, so that what was said stays where the time of a part runs out; all of them together leave a minute of ten.
  export HF_HUB_OFFLINE=1 RAY_USAGE_STATS_ENABLED=0 PYTHONUNBUFFERED=1
  local status=0 gpu_tests=(tests/distributed/test_gpu.py tests/unit/train/test_attention.py)
  timeout 140 python3 benchmarks/step.py --size 8b --rounds 5 2>&1 | tee "$results/step-8b.txt" || status=1
  timeout 90 python3 benchmarks/step.py --size 1b --rounds 7 --compile 2>&1 | tee "$results/step-1b.txt" || status=1
  timeout 50 python3 benchmarks/step.py --size 1b --rounds 7 --all-weights 2>&1 | tee "$results/step-1b-all.txt" || status=1
  timeout 140 python3 -m pytest -m gpu -o timeout=130 "${gpu_tests[@]}" 2>&1 | tee "$results/tests.txt" || status=1
  timeout 110 python3 benchmarks/gpu.py 2>&1 | tee "$results/gpu.txt" || status=1
  record
  return $status
}

record() {
  local results=${OUT:-.gpu/results} section='## Everything on one GPU' written file
  written=$(mktemp)
  # Without the section of the run before; a section ends where the next one begins.
  awk -v section="$section" '/^## /{skip = $0 == section} !skip' benchmarks/RESULTS.md >"$written"
  {
    printf '\n%s\n\n`benchmarks/gpu.sh run`, %s cores. `-m gpu`: %s.\n' "$section" "$(nproc)" \
      "$(grep -oE '[0-9]+ (passed|failed).*' "$results/tests.txt" | tail -n 1 | sed 's, *=*$,,' || echo 'no tests ran')"
    for file in "$results"/step-*.txt "$results"/gpu.txt; do
      [ -e "$file" ] || continue
      printf '\n### %s\n\n' "$(basename "$file" .txt)"
      # A table begins and ends with an empty line.
      { grep -E '^(\||#### |NVIDIA|CPU|The proof|Left out|Adapters|All weights)' "$file" || echo 'It gave no table.'; } |
        awk '{now = /^\|/; if (NR > 1 && now != was) print ""; was = now; print}'
    done
  } >>"$written"
  cat -s "$written" >benchmarks/RESULTS.md
  cp benchmarks/RESULTS.md "$results/RESULTS.md"
  rm "$written"
}

case "${1:-}" in
  pack) pack "${2:-3.12}" ;;
  run) run ;;
  record) record ;;
  *) sed -n '2,11p' "$0"; exit 2 ;;
esac
