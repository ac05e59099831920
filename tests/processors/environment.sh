#!/bin/sh
# What test_processors.py needs, into the folder $1: QEMU's user-mode emulators, and an arm64 Python with the packages that
# gpt2x needs at run time. From Debian 12, with apt and from the mirror that this machine uses, and with the pip of the
# Python $2. Installs nothing on the machine, and needs no root.
set -eu
mkdir -p "$1"
folder=$(cd "$1" && pwd)
python=$2
lists=$folder/apt/lists
sources=$folder/apt/sources.list

# apt-get with lists and packages in a folder of its own.
apt() {
    apt-get -qq -o Dir::State::lists="$lists" -o Dir::Cache="$folder/apt" -o APT::Sandbox::User="$(id -un)" "$@"
}

# The same for Debian 12 and the architecture $1, as if no package was installed.
debian() {
    architecture=$1
    shift
    apt -o APT::Architecture="$architecture" -o APT::Architectures="$architecture" \
        -o Dir::Etc::sourcelist="$sources" -o Dir::Etc::sourceparts=/dev/null \
        -o Dir::State="$folder/apt" -o Dir::State::status="$folder/apt/status" -o Debug::NoLocking=1 "$@"
}

mkdir -p "$lists/partial" "$folder/apt/archives/partial"
: > "$folder/apt/status"
apt update
mirror=$(apt indextargets --format '$(REPO_URI)' 'Created-By: Packages' | grep '/debian/*$' | head -n 1)
test -n "$mirror"
echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror bookworm main" > "$sources"

host=$(dpkg --print-architecture)
debian "$host" update
(cd "$folder/apt" && debian "$host" download qemu-user-static)
dpkg-deb --fsys-tarfile "$folder"/apt/qemu-user-static_*.deb |
    tar -x -C "$folder" --strip-components 3 ./usr/bin/qemu-x86_64-static ./usr/bin/qemu-aarch64-static

debian arm64 update
debian arm64 install --yes --no-install-recommends --download-only python3.11 libstdc++6
mkdir -p "$folder/aarch64"
for package in "$folder"/apt/archives/*.deb; do
    dpkg-deb --extract "$package" "$folder/aarch64"
done

install() {
    "$python" -m pip --disable-pip-version-check install -qq --constraint constraints.txt --upgrade \
        --target "$folder/aarch64/site" --only-binary=:all: --implementation cp --python-version 3.11 \
        --platform manylinux_2_28_aarch64 --platform manylinux_2_27_aarch64 --platform manylinux_2_17_aarch64 \
        --platform manylinux2014_aarch64 "$@"
}
install numpy google-crc32c onnxruntime
install --no-deps tokenizers
rm -rf "$folder/apt"
