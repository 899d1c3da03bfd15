#!/usr/bin/env bash
# Train on this machine, in one process or several, and start again after a crash: a run goes on
# from its newest checkpoint. Bad input (exit code 2) and a request to end (75) are not tried again.
#   launch/local.sh [--processes N] CONFIG [section.field=value ...]
#   launch/local.sh --dry-run ...            print the commands and stop
# KAVA names another executable, TRIES the number of starts (5), PORT where the processes meet
# (8476). With several processes the GPUs in CUDA_VISIBLE_DEVICES are dealt out among them.
set -uo pipefail

usage() { sed -n '2,7s/^# \{0,1\}//p' "$0" >&2; exit 2; }
dry_run=false processes=1
while [[ "${1:-}" == --* ]]; do
    case $1 in
        --dry-run) dry_run=true; shift ;;
        --processes) processes=${2:-}; shift 2 || usage ;;
        *) usage ;;
    esac
done
[[ $# -gt 0 && $processes =~ ^[1-9][0-9]*$ ]] || usage
IFS=, read -ra gpus <<<"${CUDA_VISIBLE_DEVICES:-}"

# What process number $1 runs, in the array `command`.
compose() {
    local number=$1 share=() gpu
    shift
    command=(env)
    for ((gpu = number; gpu < ${#gpus[@]}; gpu += processes)); do share+=("${gpus[gpu]}"); done
    [ ${#share[@]} -eq 0 ] || command+=("CUDA_VISIBLE_DEVICES=$(IFS=,; echo "${share[*]}")")
    if [ "$processes" -gt 1 ]; then
        command+=("KAVA_COORDINATOR=127.0.0.1:${PORT:-8476}")
        command+=("KAVA_PROCESSES=$processes" "KAVA_PROCESS=$number")
    fi
    command+=("${KAVA:-kava}" train "$@")
}

asked=false pids=()
trap 'asked=true; kill -TERM "${pids[@]}" 2>/dev/null' TERM INT
for ((try = 1; try <= ${TRIES:-5}; try++)); do
    pids=() code=0
    for ((number = 0; number < processes; number++)); do
        compose "$number" "$@"
        if $dry_run; then
            printf '%q ' "${command[@]}"; echo
            continue
        fi
        "${command[@]}" &
        pids+=($!)
    done
    $dry_run && exit 0
    for pid in "${pids[@]}"; do
        # A signal ends this wait early, not the process: wait for it again.
        while wait "$pid"; ended=$?; kill -0 "$pid" 2>/dev/null; do :; done
        [ $code -ne 0 ] || code=$ended
    done
    [[ $code -eq 0 || $code -eq 2 || $code -eq 75 ]] || $asked && exit $code
    echo "start $try of ${TRIES:-5} ended with code $code" >&2
done
exit $code
