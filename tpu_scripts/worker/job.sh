#!/usr/bin/env bash
# On a host of the TPU: start, watch and stop the one job that may run there. Called by run.sh, status.sh and stop.sh.
set -euo pipefail

HELP='usage: job.sh start NAME -- COMMAND...     run COMMAND in the code folder, detached
       job.sh state                        print: worker NUMBER NAME running|exit CODE|lost|none
       job.sh stop [--wait SECONDS] [--kill]
       (each with --dry-run: print what would be run)

Files: ~/mmdiff-jobs/NAME/job.log, .pid, .exit (the exit code, once it has ended); ~/mmdiff-jobs/latest is the newest.
A lock on ~/mmdiff-jobs/lock, held by the job and whatever it starts, shows that it lives, also after a restart of the host.

example: job.sh start one -- mmdiff train experiments/quickstart.py --workdir /mnt/runs/one'
# shellcheck source=SCRIPTDIR/../common.sh
source "$(dirname "${BASH_SOURCE[0]}")/../common.sh"

jobs=$HOME/mmdiff-jobs
latest=$jobs/latest

alive() { ! flock --shared --nonblock "$jobs/lock" true; }

state() {
  local otherwise=lost
  [[ -e $latest ]] || { echo "- none" && return; }
  ! alive || otherwise=running # asked first: a job that ends now has written its code down before it dies
  if [[ -e $latest/job.exit ]]; then
    echo "$(readlink "$latest") exit $(<"$latest/job.exit")"
  else
    echo "$(readlink "$latest") $otherwise"
  fi
}

# signal NAME: to the command of the newest job alone, for its data loaders must live until it has saved
signal() { [[ -e $latest/job.exit || ! -e $latest/job.pid ]] || kill -"$1" "$(<"$latest/job.pid")" 2>/dev/null || true; }

# to the newest job and all that it started
kill_group() { [[ ! -e $latest/job.group ]] || kill -KILL -- "-$(<"$latest/job.group")" 2>/dev/null || true; }

start() {
  local name=$1 folder=$jobs/$1
  shift
  mkdir -p "$jobs"
  [[ ! -e $folder ]] || die "there is a job $name already"
  [[ $(state) != *running ]] || die "a job runs already ($(state)): stop.sh first"
  ! alive || kill_group # what an ended job left behind may still hold the TPU
  exec 9>"$jobs/lock"
  flock --timeout 10 9 || die "something of the last job is still alive, and holds $jobs/lock"
  mkdir "$folder"
  ln --symbolic --force --no-dereference "$name" "$latest"
  cd "$HERE/.."
  export PATH=$PWD/.venv/bin:$PATH
  ulimit -n "$(ulimit -Hn)" || true # a data loader with many shards needs more than the usual 1024 open files
  echo "commit $(cat COMMIT 2>/dev/null || echo unknown): $(quoted "$@")" >"$folder/job.log"
  setsid bash "$HERE/worker/record.sh" "$folder/job" "$@" </dev/null >>"$folder/job.log" 2>&1 &
  echo $! >"$folder/job.group"
  for ((waited = 0; waited < 200; waited++)); do
    [[ ! -e $folder/job.pid ]] || return 0 # from now on it can be stopped
    sleep 0.05
  done
  die "the job did not start: $(tail -n 1 "$folder/job.log")"
}

stop() {
  local seconds=$1 kill=$2
  mkdir -p "$jobs"
  alive || { echo "no job runs" && return; }
  signal TERM
  for ((waited = 0; waited < seconds * 5; waited++)); do
    alive || return 0
    sleep 0.2
  done
  ((kill)) || die "still running after $seconds s: wait, or stop.sh --kill"
  signal KILL # first the command: record.sh can then write its code down
  sleep 0.5
  kill_group
}

action="" words=() seconds=300 kill=0
while (($#)); do
  case $1 in
    start | state | stop) action=$1 ;;
    --wait) need_value "$@" && seconds=$2 && shift ;;
    --kill) kill=1 ;;
    --) shift && break ;;
    -*) option "$1" ;;
    *) words+=("$1") ;;
  esac
  shift
done
case $action in
  start)
    ((${#words[@]} == 1 && $# > 0)) || die "give a name and, after --, a command; see job.sh --help" 2
    if ((DRY_RUN)); then run "$@"; else start "${words[0]}" "$@"; fi
    ;;
  state) ((DRY_RUN)) || echo "worker $(cat "$HOME/.mmdiff_worker" 2>/dev/null || echo 0) $(state)" ;;
  stop)
    if ((!DRY_RUN)); then
      stop "$seconds" "$kill"
    elif [[ -e $latest/job.pid ]]; then
      run kill -TERM "$(<"$latest/job.pid")"
    fi
    ;;
  *) die "say start, state or stop; see job.sh --help" 2 ;;
esac
