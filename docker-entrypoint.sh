#!/bin/sh
# Starts the gateway in its container. Where that starts as root, its working folder (/data) is given to an ordinary
# user, if it is not writable for it yet, and root is left for good. Arguments are the gateway's, or another command;
# engine_agent.py and what follows it is the engines' agent.
set -eu

user=65532 # owns /data in the image, too
log=${VLLM_STATE_GATEWAY_LOG_FILE:-engine_states.jsonl}
log=./${log##*/}

say() { printf 'docker-entrypoint.sh: %s\n' "$*" >&2; }

# Leaves no capability, and no_new_privs no way to get one back, nor a use for the bounding set (which takes one more to
# empty). None is worth keeping: NET_ADMIN, for a receive buffer beyond net.core.rmem_max, is not what Docker gives.
as_user() {
    exec setpriv --reuid="$user" --regid="$user" --clear-groups --inh-caps=-all --no-new-privs -- "$@"
}

# Not the log's folder, wherever that is: LOG_FILE=/dev/stdout would give /dev away. Nothing below it: that may be much.
# The log goes first, and only together with its folder: whoever has the folder can put any file of root's in its place.
# -h gives a link away, never what it leads to.
give_folder() {
    { [ ! -f "$log" ] || chown -h "$user" "$log"; } && chown -h "$user" .
}

starts=$([ $# -gt 0 ] || echo yes) # the daemon, and not --check-config or --health-check
case ${1--} in
    -*) set -- python3 "$(dirname -- "$0")/gateway.py" "$@" ;;
    engine_agent.py)
        shift
        set -- python3 "$(dirname -- "$0")/engine_agent.py" "$@"
        ;;
esac

[ "$(id -u)" = 0 ] || exec "$@"

if ! why=$(as_user true 2>&1); then
    say "cannot leave root ($why): start it with --user $user:$user," \
        "or with --cap-add CHOWN --cap-add SETUID --cap-add SETGID"
    exit 1
fi
# Whose it is is asked, too, since a read-only file system is writable for nobody.
if [ "$starts" ] && ! (as_user test -O . -o -w .) && ! why=$(give_folder 2>&1); then
    # Not the end: the log may be elsewhere or off, and the gateway says so itself where it cannot be opened.
    say "cannot give $PWD to user $user ($why): allow it with --cap-add CHOWN," \
        "or run 'chown $user' on the host's folder"
fi
as_user "$@"
