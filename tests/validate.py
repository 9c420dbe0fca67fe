#!/usr/bin/env python3
"""validate.py SCHEMA REPORT...: is each report what the schema says?"""

import json
import sys

import jsonschema

with open(sys.argv[1]) as f:
    schema = json.load(f)
validator = jsonschema.validators.validator_for(schema)
validator.check_schema(schema)


def shortened(v):
    """The validator is slow, and the members of a long list are all made alike."""
    if isinstance(v, dict):
        return {k: shortened(x) for k, x in v.items()}
    if isinstance(v, list):
        return [shortened(x) for x in (v if len(v) <= 200 else v[:100] + v[-100:])]
    return v


failed = 0
for name in sys.argv[2:]:
    with open(name) as f:
        report = shortened(json.load(f))
    for e in validator(schema).iter_errors(report):
        failed = 1
        print("%s: %s: %s" % (name, "/".join(map(str, e.absolute_path)), e.message[:300]))
sys.exit(failed)
