#!/bin/sh
# The endpoint alone, over a server that runs elsewhere: TRITON_URL is its gRPC address. Arguments: `triptych serve`'s.
set -eu
: "${TRITON_URL:?set TRITON_URL to host:port of the Triton server (gRPC)}"
exec triptych serve --host 0.0.0.0 --triton-url "$TRITON_URL" "$@"
