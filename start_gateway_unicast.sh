#!/bin/sh
# Runs the state gateway in unicast mode, from any folder, with whatever else is exported.
export VLLM_STATE_GATEWAY_NETWORK_MODE=unicast
exec python3 "$(dirname -- "$(readlink -f -- "$0")")/gateway.py" "$@"
