#!/usr/bin/env bash
# Make the environment of one peer: make_env.sh NAME DIR, e.g. make_env.sh autoawq ~/peers/autoawq
#
# Peers pin each other's dependencies away, so each gets an environment of its own, outside this tree. What goes into it stands
# in NAME.txt; packages whose declared dependencies are not wanted (a gigabyte of GPU compiler, for one) in NAME.no-deps.txt;
# packages whose build needs the installed torch in NAME.no-isolation.txt; what others bring and does not work here (built for
# another torch) in NAME.remove.txt. Where there is a NAME.sh, it installs NAME.txt. A complete environment is left as it is.
set -euo pipefail
if [ $# -ne 2 ] || [ ! -f "$(dirname "$0")/$1.txt" ]; then
    echo "usage: make_env.sh NAME DIR, NAME one of: $(cd "$(dirname "$0")" && ls ./*.txt | grep -v -e no- -e remove | sed 's,^\./,,; s,\.txt$,,' | xargs)" >&2
    exit 2
fi
here=$(cd "$(dirname "$0")" && pwd)
if [ -f "$2/versions.txt" ]; then exit; fi
"${PYTHON:-python3}" -m venv "$2"
pip=("$2/bin/pip" install --quiet --no-compile)
if [ -f "$here/$1.sh" ]; then
    "$here/$1.sh" "$2"
else
    "${pip[@]}" --requirement "$here/$1.txt"
fi
if [ -f "$here/$1.no-deps.txt" ]; then
    "${pip[@]}" --no-deps --requirement "$here/$1.no-deps.txt"
fi
if [ -f "$here/$1.no-isolation.txt" ]; then
    "${pip[@]}" --no-build-isolation --requirement "$here/$1.no-isolation.txt"
fi
if [ -f "$here/$1.remove.txt" ]; then
    "$2/bin/pip" uninstall --quiet --yes --requirement "$here/$1.remove.txt"
fi
"$2/bin/pip" list --format=freeze > "$2/versions.new"
mv "$2/versions.new" "$2/versions.txt"
