#!/usr/bin/env bash
# Train on a slice of Cloud TPUs that is queued for, set up, and asked for again when it is taken away:
#
#   NAME=llave ZONE=us-central2-b TYPE=v4-32 VERSION=tpu-ubuntu2204-base BUCKET=my-bucket \
#     launch/tpu_vm.sh --spot -- --config configs/tpu_v4.py:2b --workdir bucket/runs/llave-2b \
#     --config.model.path=bucket/models/aquila-vl-2b --config.data.path=bucket/MMEB-train
#
# What stands before "--" goes to `gcloud compute tpus queued-resources create` (--spot, --reserved,
# --valid-until-duration=6h, or nothing for on-demand capacity), what follows it to llave_jax.train.
# The committed state of this repository is copied to ~/llave on every host and runs there, with
# BUCKET mounted at bucket/. Data, model and workdir must lie in it: a slice that is taken away takes its
# disks along.
#
# The training does not need this script once it has started: stop the script or close the laptop, and
# run the same command again to look after the run. When the run is complete the script says so, and how
# to delete the slice, which costs until it is deleted.
set -euo pipefail
cd "$(dirname "$0")/.."

: "${NAME:?a name for the slice}" "${ZONE:?such as us-central2-b}" "${TYPE:?such as v4-32}"
: "${VERSION:?the runtime version that goes with TYPE, see docs/launch.md}"
bucket=${BUCKET:-} poll=${POLL:-60}
capacity=()
while (($#)) && [[ $1 != -- ]]; do
  capacity+=("$1")
  shift
done
if (($# < 2)); then
  echo "usage: $0 [CAPACITY_FLAG ...] -- TRAINING_ARGUMENT ..." >&2
  exit 2
fi
shift
scratch=$(mktemp -d)
trap 'rm -r "$scratch"' EXIT

say() { echo "$(date +%H:%M:%S) $NAME: $*" >&2; }

queue() { gcloud compute tpus queued-resources "$1" "$NAME" --zone="$ZONE" "${@:2}"; }

on_host() { gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker="$1" --command="$2"; }

# WAITING_FOR_RESOURCES, ACTIVE, SUSPENDED, ...; NONE if there is no such request.
state() {
  # gcloud also writes warnings to its stderr, which are no part of the answer.
  if ! queue describe --format='value(state.state)' 2>"$scratch/error"; then
    grep -q NOT_FOUND "$scratch/error" || { cat "$scratch/error" >&2 && return 1; }
    echo NONE
  fi
}

# Returns when the slice is there.
reached=''
acquire() {
  local now previous=''
  while true; do
    if ! now=$(state); then
      # The first question tells mistakes; later ones meet networks that come and go.
      [[ -n $reached ]] || exit 1
      sleep "$poll"
      continue
    fi
    reached=1
    [[ $now == "$previous" ]] || say "$now"
    previous=$now
    case $now in
      ACTIVE) return ;;
      NONE)
        queue create --node-id="$NAME" --accelerator-type="$TYPE" --runtime-version="$VERSION" \
          "${capacity[@]}"
        ;;
      SUSPENDED) queue delete --force --quiet ;;
      FAILED)
        queue describe >&2
        say "the request failed, see above. To ask again: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
        exit 1
        ;;
      *) sleep "$poll" ;;
    esac
  done
}

install() {
  git archive --format=tar.gz --output="$scratch/llave.tar.gz" HEAD \
    configs launch llave_jax tools pyproject.toml setup.py README.md LICENSE NOTICE &&
    gcloud compute tpus tpu-vm scp "$scratch/llave.tar.gz" "$NAME:" --zone="$ZONE" --worker=all &&
    on_host all "mkdir -p llave && tar -xzf llave.tar.gz -C llave && cd llave &&
      bash launch/tpu_vm_setup.sh $bucket"
}

# In a session of its own, so that it outlives the connection.
start() {
  local arguments
  printf -v arguments ' %q' "$@"
  on_host all "cd llave && rm -f train.status && {
    STATUS=train.status setsid nohup bash launch/keep_running.sh \
      .venv/bin/python -m llave_jax.train --distributed$arguments >>train.log 2>&1 </dev/null &
    echo \$! >train.pid; }"
}

# none, running, or the exit status of the run that is over.
# shellcheck disable=SC2016  # The variables are the host's.
progress() {
  on_host 0 'cd llave 2>/dev/null || { echo none; exit; }
    if [[ -e train.status ]]; then cat train.status
    elif kill -0 "$(cat train.pid)"; then echo running
    else echo none; fi 2>/dev/null'
}

watched=''
while true; do
  acquire
  # A slice that is taken away cannot be reached; the next round asks for its state.
  now=$(progress) || now=unreachable
  case $now in
    running)
      [[ -n $watched ]] || say "running"
      watched=1
      sleep "$poll"
      ;;
    0)
      say "complete. To stop paying: gcloud compute tpus queued-resources delete $NAME --zone=$ZONE --force"
      exit 0
      ;;
    unreachable) sleep "$poll" ;;
    *)
      if [[ $now != none && -n $watched ]]; then
        say "training failed with exit status $now; the end of its log:"
        on_host 0 'tail -n 20 llave/train.log'
        exit 1
      fi
      say "setting up its hosts"
      if install && start "$@"; then
        say "started. Its log: gcloud compute tpus tpu-vm ssh $NAME --zone=$ZONE --worker=0 --command='tail -f llave/train.log'"
        watched=1
      else
        sleep "$poll"
      fi
      ;;
  esac
done
