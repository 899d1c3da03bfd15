#!/usr/bin/env bash
# The larger experiment on one accelerator: write its data, train and export the teacher, run the
# grid, write the report. Every part goes on from where it stopped when it is called again.
#   launch/evidence.sh GSM8K_TRAIN_JSONL [section.field=value ...]   (overrides are for all trainings)
#   launch/evidence.sh --dry-run GSM8K_TRAIN_JSONL ...               print the commands and stop
# KAVA names another executable, PYTHON another interpreter, ROWS the generated rows (200000).
set -euo pipefail

dry_run=false
if [ "${1:-}" = "--dry-run" ]; then
    dry_run=true
    shift
fi
if [ $# -eq 0 ]; then
    sed -n '2,6s/^# \{0,1\}//p' "$0" >&2
    exit 2
fi
gsm8k=$1
shift
configs=$(cd "$(dirname "$0")/../configs" && pwd)
kava=${KAVA:-kava}
teacher=runs/evidence_teacher

run() {
    if $dry_run; then
        printf '%q ' "$@"
        echo
    else
        "$@"
    fi
}

# Generated problems and GSM8K's own rows, in the same format; the order is shuffled in training.
write_data='
import json, sys
from kava_jax.data.problems import WordProblems
source, target, rows = sys.argv[1], sys.argv[2], int(sys.argv[3])
with open(target, "w", encoding="utf-8") as out:
    for row in WordProblems("train", 0, rows):
        out.write(json.dumps({"question": row.prompt, "answer": row.answer}) + "\n")
    for line in open(source, encoding="utf-8"):
        row = json.loads(line)
        out.write(json.dumps({"question": row["question"], "answer": row["answer"]}) + "\n")
'
[ -f evidence.jsonl ] || run "${PYTHON:-python3}" -c "$write_data" "$gsm8k" evidence.jsonl "${ROWS:-200000}"
run "$kava" train "$configs/evidence_teacher.yaml" "$@"
[ -d "$teacher/export" ] || run "$kava" export "$teacher" --out "$teacher/export"
run "$kava" ablate "$configs/grids/evidence.yaml" "$@"
run "$kava" report runs/evidence
