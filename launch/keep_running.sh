#!/usr/bin/env bash
# Run a command until it is complete, starting it again when it ends early:
#
#   launch/keep_running.sh COMMAND [ARGUMENT ...]
#
# It suits training, whose command continues from the latest checkpoint. Exit status 0 means complete,
# 2 that the command or what it reads has a mistake. So has a command that fails several times in a row
# soon after its start. Then the loop ends with the command's own status. SIGTERM is passed on and ends
# the loop.
#
# Settings, as environment variables: PAUSE (seconds between starts, 10), SOON (a failure within so many
# seconds is an early one, 600), TRIES (early failures in a row that end the loop, 3), STATUS (a file that
# gets the exit status when the loop ends).
set -uo pipefail
# Each command gets a process group of its own, whose number is the command's.
set -m

pause=${PAUSE:-10} soon=${SOON:-600} tries=${TRIES:-3}
(($#)) || { echo "usage: $0 COMMAND [ARGUMENT ...]" >&2; exit 2; }

child='' stopping=''
stop() {
  stopping=1
  # The command alone is told: it ends its own helpers when its work is saved.
  [[ -z $child ]] || kill -TERM "$child" 2>/dev/null
}
finish() {
  [[ -z ${STATUS:-} ]] || echo "$1" >"$STATUS"
  exit "$1"
}
trap stop TERM INT

failures=0
while true; do
  start=$SECONDS
  "$@" &
  child=$!
  # A signal interrupts `wait`; the command still saves its work and ends by itself.
  wait "$child"
  status=$?
  while kill -0 "$child" 2>/dev/null; do
    wait "$child"
    status=$?
  done
  # A command that crashed may have left helpers behind, which would fill memory start by start.
  kill -KILL -- "-$child" 2>/dev/null
  child=''
  if [[ $status == [02] || -n $stopping ]]; then
    finish "$status"
  fi
  failures=$((SECONDS - start < soon ? failures + 1 : 0))
  if ((failures >= tries)); then
    echo "$0: exit status $status, $failures times in a row within $soon s; not started again" >&2
    finish "$status"
  fi
  echo "$0: exit status $status; starting again in $pause s" >&2
  sleep "$pause" &
  wait $!
  [[ -z $stopping ]] || finish "$status"
done
