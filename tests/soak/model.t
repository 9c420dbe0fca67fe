#!/bin/bash
# Forty thousand guest operations on each kind of image: tests/t/model.t at length.
SOAK=1 exec bash "$(dirname "$0")/../t/model.t"
