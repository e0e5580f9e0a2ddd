# What the shell of a sitting knows before the first line of a document: servers go to the background, and the next
# command comes when they answer. Variables: LOGS, ENGINE (what runs in place of vLLM, or empty), ENGINE_ARGUMENTS.
set -euo pipefail
started=()

finish() {
    for pid in "${started[@]}"; do kill "$pid" 2>/dev/null || true; done
    for pid in "${started[@]}"; do wait "$pid" || true; done
}
trap finish EXIT

# wait_for PID SECONDS COMMAND...: until the command succeeds, as long as the process lives.
wait_for() {
    local pid=$1 ends=$((SECONDS + $2))
    shift 2
    until "$@" >/dev/null 2>&1; do
        if ! kill -0 "$pid" 2>/dev/null || [ "$SECONDS" -gt "$ends" ]; then
            echo "sitting: $* did not succeed; logs:" >&2
            tail -n 30 "$LOGS"/*.log >&2
            return 1
        fi
        sleep 0.2
    done
}

replica_is_known() { command hotweights coord-status --json | grep -Eq '"active_digest": "[0-9a-f]{64}"'; }

hotweights() {
    if [ "$1" != coord-serve ]; then command hotweights "$@"; return; fi
    command hotweights "$@" >>"$LOGS/coordinator.log" 2>&1 &
    started+=($!)
    wait_for $! 90 grep -q "coordinator at" "$LOGS/coordinator.log"
}

python() {
    if [ "$1 ${2:-}" != "-m vllm.entrypoints.openai.api_server" ]; then command python "$@"; return; fi
    if [ -n "$ENGINE" ]; then
        command python "$ENGINE" "${@:3}" >>"$LOGS/engine.log" 2>&1 &
    else
        # The last of two equal options holds.
        command python "$@" $ENGINE_ARGUMENTS >>"$LOGS/engine.log" 2>&1 &
    fi
    started+=($!)
    wait_for $! 600 replica_is_known
}
