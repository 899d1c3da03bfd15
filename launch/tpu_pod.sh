#!/usr/bin/env bash
# Train on a Cloud TPU slice from this checkout: ask for it, install, run on all its hosts, and when
# it is taken away ask for another one. The run lies in gs://BUCKET/NAME; it goes on from its newest
# checkpoint there.
#   NAME=kava ZONE=us-east5-a TYPE=v5litepod-64 BUCKET=my-bucket launch/tpu_pod.sh CONFIG [field=value ...]
#   ... launch/tpu_pod.sh --dry-run CONFIG ...    print the commands and stop
# VERSION names the runtime (v2-alpha-tpuv5-lite), SPOT=1 takes a cheaper slice that can be taken
# away, TRIES is the number of slices to ask for (20). Needs gcloud, logged in.
set -uo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=true
    shift
fi
if [ $# -eq 0 ] || [ -z "${NAME:-}" ] || [ -z "${ZONE:-}" ] || [ -z "${TYPE:-}" ] || [ -z "${BUCKET:-}" ]; then
    sed -n '2,8s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
tpu=(gcloud compute tpus)
checkout=$(cd "$(dirname "$0")/.." && pwd)
config=$1
shift

run() {
    if $dry_run; then printf '%q ' "$@"; echo; else "$@"; fi
}
on_all_hosts() { run "${tpu[@]}" tpu-vm ssh "$NAME" --zone "$ZONE" --worker=all --command "$1"; }
state() { "${tpu[@]}" queued-resources describe "$NAME" --zone "$ZONE" --format 'value(state.state)'; }
give_back() { run "${tpu[@]}" queued-resources delete "$NAME" --zone "$ZONE" --quiet --force; }

for ((try = 1; try <= ${TRIES:-20}; try++)); do
    run "${tpu[@]}" queued-resources create "$NAME" --node-id "$NAME" --zone "$ZONE" \
        --accelerator-type "$TYPE" --runtime-version "${VERSION:-v2-alpha-tpuv5-lite}" \
        ${SPOT:+--spot} || exit 1
    until $dry_run || [ "$(state)" = ACTIVE ]; do sleep 30; done
    run "${tpu[@]}" tpu-vm scp --recurse "$checkout" "$NAME:kava" --zone "$ZONE" --worker=all
    # The slice's own Python may be old, so uv brings one.
    on_all_hosts "pip install --quiet uv && uv venv --quiet --python 3.12 venv && \
uv pip install --quiet --python venv/bin/python './kava[tpu,gcs]'"
    on_all_hosts "cd kava && ../venv/bin/kava --cluster train \
$(printf '%q ' "$config" "run.dir=gs://$BUCKET/$NAME" "$@")"
    code=$?
    give_back
    $dry_run && exit 0
    [[ $code -eq 0 || $code -eq 2 ]] && exit $code
    echo "slice $try of ${TRIES:-20} ended with code $code" >&2
done
exit $code
