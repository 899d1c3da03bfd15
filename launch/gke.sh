#!/usr/bin/env bash
# Train on GKE (with JobSet installed): fill in gke_jobset.yaml and apply it. Pods that are taken
# away come back by themselves, and the run goes on from its newest checkpoint in gs://BUCKET/NAME.
#   NAME=kava IMAGE=REGISTRY/kava:tpu HOSTS=16 CHIPS=4 ACCELERATOR=tpu-v5-lite-podslice \
#     TOPOLOGY=8x8 BUCKET=my-bucket launch/gke.sh CONFIG [section.field=value ...]
#   ... launch/gke.sh --dry-run CONFIG ...    print the manifest and the command, and stop
# HOSTS and CHIPS (of a host) must fit the topology; IMAGE is built from launch/Dockerfile.tpu.
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=true
    shift
fi
names=(NAME IMAGE HOSTS CHIPS ACCELERATOR TOPOLOGY BUCKET)
missing=()
for name in "${names[@]}"; do
    [ -n "${!name:-}" ] || missing+=("$name")
done
if [ $# -eq 0 ] || [ ${#missing[@]} -gt 0 ]; then
    sed -n '2,7s/^# \{0,1\}//p' "$0" >&2
    [ ${#missing[@]} -eq 0 ] || echo "missing: ${missing[*]}" >&2
    exit 2
fi

# Each argument as a JSON string, so that braces and commas stay what they are.
quoted=()
for argument in "$1" "run.dir=gs://$BUCKET/$NAME" "${@:2}"; do
    argument=${argument//\\/\\\\}
    quoted+=("\"${argument//\"/\\\"}\"")
done
ARGUMENTS=$(printf '%s, ' "${quoted[@]}")
ARGUMENTS=${ARGUMENTS%, }

manifest=$(<"$(dirname "$0")/gke_jobset.yaml")
for name in "${names[@]}" ARGUMENTS; do
    manifest=${manifest//"\${$name}"/"${!name}"}
done
if $dry_run; then
    echo "$manifest"
    echo "# kubectl apply -f -"
else
    kubectl apply -f - <<<"$manifest"
fi
