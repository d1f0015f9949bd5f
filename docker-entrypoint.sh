#!/bin/sh
# The start of the image: `tightrope serve` with the arguments given, as a user without privileges.
#
# Started as root, it serves as the owner of the folder /data, so that a folder of the host can be written whoever made
# it; docker makes one that isn't there as root's, which then becomes the image's own user's. What is root's in it, such
# as the downloads of a server that ran as root, becomes that user's as well. Port 80 may be listened on all the same.
set -eu
data=${HF_HOME:?}
if [ "$(id -u)" = 0 ]; then
    owner=$(stat -c %u:%g -- "$data")
    [ "$owner" != 0:0 ] || owner=10001:10001
    find "$data" -xdev -user 0 -exec chown -h -- "$owner" {} + 2>/dev/null || true # it may be read-only
    exec setpriv --reuid "${owner%:*}" --regid "${owner#*:}" --clear-groups --bounding-set=-all,+net_bind_service \
        --inh-caps=-all,+net_bind_service --ambient-caps=-all,+net_bind_service -- "$0" "$@"
fi
# Compiled kernels and what libraries keep go into the volume, or else no further than this container.
if ! mkdir -p -- "$HOME" 2>/dev/null || ! [ -w "$HOME" ]; then
    export HOME=/tmp/tightrope TRITON_CACHE_DIR=/tmp/tightrope/triton
fi
exec "$(dirname -- "$0")/.venv/bin/tightrope" serve "$@"
