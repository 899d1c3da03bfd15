#!/usr/bin/env bash
# Train on all devices of one host and start again after a crash; a run continues by itself from
# its newest checkpoint. Bad input (exit code 2) is not tried again.
#   launch/single_host.sh CONFIG [section.field=value ...]
#   launch/single_host.sh --dry-run CONFIG ...      print the command and stop
# KAVA names another executable, TRIES the number of starts (default 5).
set -uo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=true
    shift
fi
if [ $# -eq 0 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi

command=("${KAVA:-kava}" train "$@")
if $dry_run; then
    printf '%q ' "${command[@]}"
    echo
    exit 0
fi

for ((try = 1; try <= ${TRIES:-5}; try++)); do
    "${command[@]}"
    code=$?
    [ $code -eq 0 ] || [ $code -eq 2 ] && exit $code
    echo "start $try of ${TRIES:-5} ended with code $code" >&2
done
exit $code
