#!/usr/bin/env bash
# Object stores for the tests, unpacked into a folder (default .ci/servers, or $UCP_TEST_SERVERS) without touching the
# system: Ceph and nginx from the distribution's packages, azurite from npm, Swift from PyPI. Does what is not done yet.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
folder=${UCP_TEST_SERVERS:-$here/../../.ci/servers}
mkdir -p "$folder"
folder=$(cd "$folder" && pwd)

ceph=(ceph-common ceph-mgr ceph-mon ceph-osd radosgw)
nginx=(nginx)

# Packages and all they need that is not installed, unpacked below root/.
debian() {
    local cache=$folder/apt
    mkdir -p "$cache/archives/partial" "$folder/root"
    if [[ $(id -u) == 0 ]]; then
        apt-get update --quiet || echo "apt-get update failed; going on with the lists there are" >&2
    fi
    # A lock of its own lets users without rights download, too.
    apt-get install --yes --no-install-recommends --download-only --quiet \
        -o Dir::Cache="$cache" -o Debug::NoLocking=1 "$@"
    for package in "$cache"/archives/*.deb; do
        dpkg -x "$package" "$folder/root"
    done
    rm -rf "$cache"
}

wanted=()
[[ -x $folder/root/usr/bin/radosgw && -x $folder/root/usr/bin/ceph-osd ]] || wanted+=("${ceph[@]}")
[[ -x $folder/root/usr/sbin/nginx ]] || wanted+=("${nginx[@]}")
if ((${#wanted[@]})); then
    debian "${wanted[@]}"
fi

if [[ ! -x $folder/npm/node_modules/.bin/azurite-blob ]]; then
    mkdir -p "$folder/npm"
    npm install --prefix "$folder/npm" --no-audit --no-fund --loglevel=error azurite@3
fi

if [[ ! -x $folder/swift/bin/swift-proxy-server ]]; then
    python3 -m venv "$folder/swift"
    "$folder/swift/bin/pip" install --quiet 'swift==2.38.*'
fi

echo "servers for the tests are in $folder"
