#!/usr/bin/env bash
# Starts one script on all workers of a TPU VM slice, or as several processes on this machine.
set -euo pipefail

usage() {
  cat <<'TEXT'
Usage:
  experiments/run_tpu.sh --tpu NAME --zone ZONE [--project ID] [--dir DIR] [options] SCRIPT [ARGUMENT ...]
  experiments/run_tpu.sh --local N [options] SCRIPT [ARGUMENT ...]

SCRIPT is what would follow `python -m` (experiments.align), or a .py file. It runs once a worker; the processes find
each other through jax.distributed (deconfound_jax/train/hosts.py). On a slice, the repository and its environment
must be on every worker already: nothing is copied there, and of the environment only what --env names.

  --tpu NAME          the TPU VM (slice); needs gcloud, logged in
  --zone ZONE         its zone
  --project ID        its project; default: gcloud's
  --dir DIR           the repository on the workers, below their home; default: deconfound_jax
  --local N           N processes here, on CPU, summed over by gloo
  --env NAME=VALUE    set for the script, on every worker; again for more. Not for secrets: a command line is readable
  --python PATH       default: .venv/bin/python on workers, python3 here
  --logs DIR          a file a worker; default: runs/logs
  --dry-run           print the commands

Example, in a workdir that all workers reach:
  experiments/run_tpu.sh --tpu v4 --zone us-central2-b --env JAX_LOG_COMPILES=1 \
    experiments.align --preset newsroom --workdir gs://bucket/newsroom
TEXT
}

fail() {
  printf 'run_tpu.sh: %s\n' "$1" >&2
  exit 2
}

free_port() {
  "$1" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])'
}

tpu="" zone="" project="" dir="deconfound_jax" processes="" python="" logs="runs/logs" dry=""
variables=()
while [[ $# -gt 0 ]]; do
  case "$1" in
    -h | --help) usage; exit 0 ;;
    --dry-run) dry=yes; shift; continue ;;
    --tpu | --zone | --project | --dir | --local | --env | --python | --logs) ;;
    -*) fail "unknown option $1; --help lists those there are" ;;
    *) break ;;
  esac
  [[ $# -ge 2 ]] || fail "$1: expected a value"
  case "$1" in
    --tpu) tpu=$2 ;;
    --zone) zone=$2 ;;
    --project) project=$2 ;;
    --dir) dir=$2 ;;
    --local) processes=$2 ;;
    --python) python=$2 ;;
    --logs) logs=$2 ;;
    --env)
      [[ $2 =~ ^[A-Za-z_][A-Za-z0-9_]*= ]] || fail "--env: expected NAME=VALUE, got $2"
      variables+=("$2")
      ;;
  esac
  shift 2
done
[[ $# -gt 0 ]] || { usage >&2; exit 2; }

run_on_slice() {
  [[ -n $zone ]] || fail "--zone: expected the zone of --tpu $tpu"
  local command ssh=(gcloud compute tpus tpu-vm ssh "$tpu" --zone "$zone" --worker=all --output-directory "$logs")
  [[ -z $project ]] || ssh+=(--project "$project")
  # Quoted twice: for this shell by the array, for the workers' by printf.
  command="cd $(printf '%q' "$dir") && $(printf '%q ' env DECONFOUND_HOSTS=auto ${variables[@]+"${variables[@]}"} \
    "${python:-.venv/bin/python}" -m deconfound_jax.train.hosts "$@")"
  if [[ -n $dry ]]; then
    printf '%q ' "${ssh[@]}" --command "$command"
    printf '\n'
    return
  fi
  mkdir -p "$logs"
  "${ssh[@]}" --command "$command"
}

# Ten seconds to save, as before a preemption: jax.distributed takes SIGTERM for one, and goes on.
stop_here() {
  kill "$@" 2>/dev/null || true
  for _ in {1..40}; do
    [[ -n $(jobs -rp) ]] || return 0
    sleep 0.25
  done
  kill -KILL "$@" 2>/dev/null || true
}

run_here() {
  [[ $processes =~ ^[1-9][0-9]*$ ]] || fail "--local: expected a number of processes, got $processes"
  local port i ids=() status=0 here=${python:-python3}
  port=$(free_port "$here")
  mkdir -p "$logs"
  for ((i = 0; i < processes; i++)); do
    local command=(env JAX_PLATFORMS=cpu "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port" "JAX_NUM_PROCESSES=$processes"
      "JAX_PROCESS_ID=$i" ${variables[@]+"${variables[@]}"} "$here" -m deconfound_jax.train.hosts "$@")
    if [[ -n $dry ]]; then
      printf '%q ' "${command[@]}"
      printf '\n'
      continue
    fi
    "${command[@]}" >"$logs/worker-$i.log" 2>&1 &
    ids+=($!)
  done
  [[ -z $dry ]] || return 0
  trap 'stop_here "${ids[@]}"' EXIT
  # The first that fails ends the others, which would wait for it.
  while [[ $status -eq 0 && -n $(jobs -rp) ]]; do
    wait -n || status=$?
  done
  [[ $status -eq 0 ]] || stop_here "${ids[@]}"
  for i in "${ids[@]}"; do
    wait "$i" 2>/dev/null || status=$((status ? status : $?))
  done
  if [[ $status -ne 0 ]]; then
    for ((i = 0; i < processes; i++)); do
      printf '== worker %s\n' "$i" >&2
      tail -n 20 "$logs/worker-$i.log" >&2
    done
  fi
  trap - EXIT
  return "$status"
}

if [[ -n $processes && -n $tpu ]]; then
  fail "expected one of --tpu and --local, got both"
elif [[ -n $processes ]]; then
  run_here "$@"
elif [[ -n $tpu ]]; then
  run_on_slice "$@"
else
  fail "expected --tpu NAME or --local N"
fi
