#!/usr/bin/env bash
# Train by the exports of an env file, by a config.json, by flags, or by all three:
#   ./train.sh                            reads ./sd2x-env.sh (ENV_FILE=path: another one; ENV_FILE=/dev/null: none)
#   ./train.sh --config config.json       reads config.json; what ./sd2x-env.sh exports, if it is there, wins over it
#   ./train.sh --name=value ...           flags win over both; --help lists them
#   ./train.sh --demo [name] [flags ...]  runs the example in examples/demo
# Works with the bash 3.2 of macOS: no associative arrays, no ${name@Q}, no mapfile.

cd "$(dirname "${BASH_SOURCE[0]}")" || exit
root=$PWD
. helpers/environment.sh

usage() {
    cat <<'END'
Two ways to start training:
  cp sd2x-env.sh.example sd2x-env.sh         edit its exports, then run ./train.sh
  cp config.json.example config.json         edit its keys, then run ./train.sh --config config.json
Both need a dataset: cp multidatabackend_deepfloyd.json.example multidatabackend_deepfloyd.json, and edit that
(for Stable Diffusion multidatabackend_sd2x.json.example).
To see it work first: ./train.sh --demo. All options: ./train.sh --help, or OPTIONS.md.
END
}

refuse() {
    printf '%s\n' "$@" >&2
    exit 2
}

# Is there a demo of this name?
is_demo() {
    [ -n "$1" ] && [ -f "examples/demo/sd2x-env-$1.sh" ]
}

# The command that was typed, with --demo and its name first.
demo_command() {
    local argument previous='' demo=--demo rest=''
    for argument in "$@"; do
        if [ "$previous" = --demo ] && is_demo "$argument"; then
            demo="--demo $argument"
        elif [ "$argument" != --demo ]; then
            rest=$rest$(printf ' %q' "$argument")
        fi
        previous=$argument
    done
    printf './train.sh %s%s' "$demo" "$rest"
}

# What was typed, for the trainer to say how an interrupted run goes on.
typed=./train.sh
[ $# -eq 0 ] || typed=$typed$(printf ' %q' "$@")
[ -z "${ENV_FILE:-}" ] || typed="ENV_FILE=$(printf %q "$ENV_FILE") $typed"

# Which files to read.
words=("$@")
env_file=${ENV_FILE:-}
if [ "${1:-}" = --demo ]; then
    shift
    env_file=examples/demo/sd2x-env.sh
    case ${1:--} in
    -*) ;;
    *)
        env_file=examples/demo/sd2x-env-$1.sh
        is_demo "$1" || refuse "--demo $1: there is no such demo (no $env_file); ./train.sh --demo is the main one"
        shift
        ;;
    esac
elif [ -z "$env_file" ] && [ -f sd2x-env.sh ]; then
    env_file=sd2x-env.sh
fi
with_config=
for argument in "$@"; do
    case $argument in
    --demo) refuse "--demo: type it first, flags after it: $(demo_command "${words[@]}")" ;;
    --config | --config=*) with_config=yes ;;
    --help | -h)
        # Help makes no environment: a newcomer who asks for it first gets the short form.
        find_python && exec "$PYTHON" -m helpers.config.help
        usage
        exit
        ;;
    esac
done
if [ -z "$env_file" ] && [ -z "$with_config" ] && [ -f config.json ]; then
    set -- --config=config.json "$@"
fi
if [ -z "$env_file" ] && [ $# -eq 0 ]; then
    refuse "There is no sd2x-env.sh and no config.json, and no flags were typed." "$(usage)"
fi

# Read the env file: what it assigns is exported, with or without the word. A command in it that fails is an error,
# because a slip like `LEARNING_RATE = 4e-5` is one. `set -e` would do that too, but end without a word.
flags=("$@")
outer=$(compgen -e)
if [ -n "$env_file" ]; then
    if [ ! -r "$env_file" ] || [ -d "$env_file" ]; then
        refuse "ENV_FILE: there is no file $env_file that can be read (relative paths count from $root)"
    fi
    if [ -f "$env_file" ] && LC_ALL=C grep -q -e $'\r$' -- "$env_file"; then
        refuse "$env_file has Windows line ends, which the shell takes for a part of the values: save it with Unix ones (LF)"
    fi
    echo "Reading $env_file" >&2
    case $env_file in /*) env_path=$env_file ;; *) env_path=./$env_file ;; esac
    env_failed=''
    line_break=$'\n'
    # On one line: a line break in a trap shifts LINENO.
    trap 'env_failed="$env_failed${line_break}  near line $LINENO: $BASH_COMMAND"' ERR
    set -a
    # shellcheck disable=SC1090  # it is the user's own
    . "$env_path"
    set +aeu
    trap - ERR
    IFS=$' \t\n'
    cd "$root" || exit
    [ -z "$env_failed" ] || refuse "$env_file: a command in it failed (an assignment has no spaces round its =):$env_failed"
fi

need_python || exit
line=$(FLOYDTUNER_OUTER=$outer "$PYTHON" -m helpers.config.env ${flags[@]+"${flags[@]}"}) || exit
printf '\n%s\n\n' "$line" >&2
export FLOYDTUNER_ENV_FILE=$env_file FLOYDTUNER_COMMAND=$typed
eval "set -- $line"
# The trainer takes this shell's place: its exit code and its signals are those of the run.
exec "$@"
