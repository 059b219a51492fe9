#!/bin/sh
# The whole server: Triton with its stages, and the endpoint that watches over them. Arguments: those of `triptych serve`.
set -eu
exec triptych serve --host 0.0.0.0 --triton-host 0.0.0.0 --http-port 8000 --grpc-port 8001 --metrics-port 8002 "$@"
