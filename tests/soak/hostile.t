#!/bin/bash
# Twenty thousand damaged images: tests/t/hostile.t at length.
SOAK=1 exec bash "$(dirname "$0")/../t/hostile.t"
