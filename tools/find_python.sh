#!/bin/sh
# Prints the first Python that runs and can be used: 3.12 (primary stack), else 3.11 (fallback). With an argument
# (3.11 or 3.12) only that version counts. Each candidate is run, since a version manager's shim may exist and fail.
for version in ${1:-3.12 3.11}; do
    for candidate in "python$version" "$HOME/.pyenv/versions/$version".*/bin/python python3; do
        if "$candidate" -c "import sys, venv, ensurepip; sys.exit('%d.%d' % sys.version_info[:2] != '$version')" 2>/dev/null; then
            command -v "$candidate"
            exit 0
        fi
    done
done
echo "no usable Python ${1:-3.12 or 3.11} with the venv module found (Debian: apt install python3-venv)" >&2
exit 1
