#!/bin/sh
# ONNX Runtime's C++ headers, which neither its Python nor its npm package brings, into the folder $1: from Debian's
# package libonnxruntime-dev, with apt and from the mirror that this machine uses, installing nothing.
set -eu
folder=$1
suite=${2:-trixie}
mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
mkdir -p "$folder/lists/partial" "$folder/cache/archives/partial"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$folder/sources.list"
apt() {
    apt-get -qq -o Dir::Etc::sourcelist="$folder/sources.list" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State::lists="$folder/lists" -o Dir::Cache="$folder/cache" -o APT::Sandbox::User="$(id -un)" "$@"
}
cd "$folder"
apt update
apt download libonnxruntime-dev
dpkg -x libonnxruntime-dev_*.deb .
test -f usr/include/onnxruntime/onnxruntime_cxx_api.h
