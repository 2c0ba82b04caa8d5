#!/usr/bin/env bash
# Train by the exports of an env file, by a config.json, by flags, or by all three:
#   ./train.sh                            reads ./sd2x-env.sh (ENV_FILE=path: another one; ENV_FILE=/dev/null: none)
#   ./train.sh --config config.json       reads config.json too; what ./sd2x-env.sh exports wins over it
#   ./train.sh --name=value ...           flags win over both; --help lists them
#   ./train.sh --demo [name] [flags ...]  runs the example in examples/demo
cd "$(dirname "${BASH_SOURCE[0]}")" || exit
. helpers/environment.sh

usage() {
    cat >&2 <<'END'
There is neither an env file nor a config.json, so there is nothing to train yet. Two ways to start:
  cp sd2x-env.sh.example sd2x-env.sh         edit its exports, then run ./train.sh
  cp config.json.example config.json         edit its keys, then run ./train.sh --config config.json
Both need a dataset: cp multidatabackend_deepfloyd.json.example multidatabackend_deepfloyd.json, and edit that.
To see it work first: ./train.sh --demo. All options: ./train.sh --help, or OPTIONS.md.
END
}

# Read the env file into the environment; plain assignments count as exports. A command in it that fails is an error.
read_env_file() {
    case $1 in /*) floydtuner_path=$1 ;; *) floydtuner_path=./$1 ;; esac
    if [ ! -r "$1" ] || [ -d "$1" ]; then
        echo "ENV_FILE: there is no file $1 that can be read" >&2
        exit 2
    fi
    if LC_ALL=C grep -q $'\r$' "$1"; then
        echo "$1 has Windows line ends, which a shell takes for part of the values: save it with Unix line ends (LF)" >&2
        exit 2
    fi
}
