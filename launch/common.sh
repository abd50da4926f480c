# What the scripts beside it share: mistakes, and commands that are run, or with --dry-run printed. To be sourced.
# shellcheck shell=bash disable=SC2034

dry_run=''
exec 3>&1 # where commands are printed, from within $(…) too

say() { printf '%s: %s\n' "${0##*/}" "$1" >&2; }

die() {
  say "error: $1"
  exit 2
}

# The text $1 with $3 for each $2. Shells differ in what ${…//…/…} makes of quotes, \ and &.
replaced() {
  local rest=$1 text=''
  while [[ $rest == *"$2"* ]]; do
    text+=${rest%%"$2"*}$3
    rest=${rest#*"$2"}
  done
  printf '%s' "$text$rest"
}

# The words as a shell reads them back.
quoted() {
  local word line=''
  for word; do
    [[ $word =~ ^[A-Za-z0-9_./:=@%+,~-]+$ ]] || word="'$(replaced "$word" "'" "'\\''")'"
    line+="$word "
  done
  printf '%s' "${line% }"
}

# Runs the command; with --dry-run prints it.
run() {
  if [[ $dry_run ]]; then
    printf '%s\n' "$(quoted "$@")" >&3
  else
    "$@"
  fi
}

# The value of the flag $1, given as --flag=value or as --flag value: sets `value`, and how many words it took, `taken`.
flag_value() {
  if [[ $1 == *=* ]]; then
    value=${1#*=} taken=1
  else
    (($# > 1)) || die "$1: needs a value"
    value=$2 taken=2
  fi
  [[ $value ]] || die "${1%%=*}: needs a value"
}

# The workdir that a training command names; nothing if it names none.
workdir_of() {
  local before='' word
  for word; do
    if [[ $before =~ ^--?workdir$ ]]; then
      printf '%s' "$word"
      return
    elif [[ $word =~ ^--?workdir= ]]; then
      printf '%s' "${word#*=}"
      return
    fi
    before=$word
  done
}
