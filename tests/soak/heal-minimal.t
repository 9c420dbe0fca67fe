#!/bin/bash
# Forty aged images of each kind, healed in the fewest clusters: tests/t/heal-minimal.t at length.
SOAK=1 exec bash "$(dirname "$0")/../t/heal-minimal.t"
