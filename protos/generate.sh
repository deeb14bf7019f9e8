#!/bin/sh
# Regenerate fogline_protocol/v1 from fogline/v1, or into the folder named as $1.
# The virtual path makes protoc emit imports below fogline_protocol.v1 without moving files.
set -eu
cd "$(dirname "$0")"
out=${1:-.}
mkdir -p "$out/fogline_protocol/v1"
"${PYTHON:-python}" -m grpc_tools.protoc -Ifogline_protocol/v1=fogline/v1 \
  --python_out="$out" --pyi_out="$out" \
  fogline/v1/fleet.proto fogline/v1/inference.proto fogline/v1/model_config.proto \
  fogline/v1/release.proto
