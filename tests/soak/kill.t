#!/bin/bash
# A hundred SIGKILLs of each kind: tests/t/kill.t at length.
SOAK=1 exec bash "$(dirname "$0")/../t/kill.t"
