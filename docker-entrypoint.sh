#!/bin/sh
# The start of the image: `tightrope serve` with the arguments given, as a user without privileges.
#
# Started as root, it serves as the owner of the folder /data, so that a folder of the host can be written whoever made
# it; docker makes one that isn't there as root's, which then becomes the image's own user's. What is root's in it, such
# as the downloads of a server that ran as root, becomes that user's as well. Port 80 may be listened on all the same.
set -eu
data=${HF_HOME:?}
# A cluster with a service called tightrope sets this one to the service's address, in the place of the image's port.
case ${TIGHTROPE_PORT:-} in *://*) export TIGHTROPE_PORT=80 ;; esac
if [ "$(id -u)" = 0 ]; then
    mkdir -p -- "$data" 2>/dev/null || true
    owner=$(stat -c %u:%g -- "$data")
    [ "$owner" != 0:0 ] || owner=10001:10001
    find "$data" -xdev -user 0 -exec chown -h -- "$owner" {} + 2>/dev/null || true # it may be read-only
    for kept in ,+net_bind_service ''; do # the container may have none of it to keep
        user="--reuid ${owner%:*} --regid ${owner#*:} --clear-groups --bounding-set=-all$kept --inh-caps=-all$kept --ambient-caps=-all$kept"
        # shellcheck disable=SC2086
        if setpriv $user -- true 2>/dev/null; then exec setpriv $user -- "$0" "$@"; fi
    done
    echo "tightrope: this container's root may become no other user (CAP_SETUID and CAP_SETGID): it serves as root" >&2
fi
# Compiled kernels and what libraries keep go into the volume, or else no further than this container.
if ! mkdir -p -- "$HOME" 2>/dev/null || ! [ -w "$HOME" ]; then
    export HOME=/tmp/tightrope TRITON_CACHE_DIR=/tmp/tightrope/triton
fi
exec "$(dirname -- "$0")/.venv/bin/tightrope" serve "$@"
