#!/usr/bin/env bash
# A job of N processes on this machine's processor, to try what runs on many hosts: launch/local.sh N -- COMMAND…
#
#   launch/local.sh 2 --devices=2 -- python -m jax_resnet.main --config configs/resnet20_digits.py --workdir runs/two
#
#   --devices=K   each process has K simulated devices; default 1
#   --all         prints what every process prints, [1] before the lines of process 1; without it, process 0's alone
#   --dry-run     prints the commands
#
# SIGINT, SIGTERM and SIGHUP go to all of them. It leaves with 0 if all did, with 2 (a mistake) if one did, else with the
# largest of their statuses.
set -euo pipefail

# shellcheck source=common.sh
. "$(dirname "${BASH_SOURCE[0]}")/common.sh"

processes=${1-} devices=1 all=''
[[ $processes =~ ^[1-9][0-9]?$ ]] || die "give the number of processes first, 1 to 99, not '$processes'"
shift
while (($#)); do
  taken=1
  case $1 in
    --devices | --devices=*) flag_value "$@" && devices=$value ;;
    --all) all=1 ;;
    --dry-run) dry_run=1 ;;
    --)
      shift
      break
      ;;
    *) die "$1: no such flag; those of the command come after --" ;;
  esac
  shift "$taken"
done
(($#)) || die "give -- COMMAND"
[[ $devices =~ ^[1-9][0-9]?$ ]] || die "--devices=$devices: must be 1 to 99"
python=$(command -v python || command -v python3) || die "python: not found"

port=$("$python" -c 'import socket; s = socket.socket(); s.bind(("127.0.0.1", 0)); print(s.getsockname()[1])')
[[ -z $dry_run ]] || port=PORT
flags="${XLA_FLAGS:+$XLA_FLAGS }--xla_force_host_platform_device_count=$devices"

process() { # the number, and the command
  local number=$1 environment
  shift
  environment=(env JAX_PLATFORMS=cpu "XLA_FLAGS=$flags" "JAX_COORDINATOR_ADDRESS=127.0.0.1:$port"
    "JAX_NUM_PROCESSES=$processes" "JAX_PROCESS_ID=$number")
  if [[ $dry_run ]]; then
    run "${environment[@]}" "$@"
  else
    exec "${environment[@]}" "$@" 3>&- # so that it is the command that is told of signals, not a shell around it
  fi
}

pids=() interrupted=''
# shellcheck disable=SC2329  # by the traps below
pass_on() {
  interrupted=1
  ((!${#pids[@]})) || kill -s "$1" -- "${pids[@]}" 2>/dev/null || true
}
for signal in INT TERM HUP; do
  # shellcheck disable=SC2064  # each its own
  trap "pass_on $signal" "$signal"
done

set -m # process groups of their own: Ctrl-C reaches them once, through here, and is not ignored as for an & in a script
for ((i = 0; i < processes; i++)); do
  if [[ $dry_run ]]; then
    process "$i" "$@"
  elif [[ $all ]]; then
    process "$i" "$@" </dev/null > >(sed "s/^/[$i] /") 2>&1 &
  elif ((i)); then
    process "$i" "$@" </dev/null >/dev/null 2>&1 &
  else
    process "$i" "$@" </dev/null &
  fi
  [[ $dry_run ]] || pids+=("$!")
done
set +m

worst=0
for i in ${pids[@]+"${!pids[@]}"}; do
  interrupted=1 status=0
  while [[ $interrupted ]]; do # a signal ends the wait, not the process
    interrupted='' status=0
    wait "${pids[i]}" || status=$?
  done
  if ((i && status && !worst)) && [[ -z $all ]]; then
    say "process $i has ended with status $status; --all shows what it prints"
  fi
  if ((status == 2 || (worst != 2 && status > worst))); then worst=$status; fi
done
exit "$worst"
