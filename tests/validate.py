#!/usr/bin/env python3
"""validate.py SCHEMA REPORT...: is each report what the schema says?"""

import json
import sys

import jsonschema

with open(sys.argv[1]) as f:
    schema = json.load(f)
validator = jsonschema.validators.validator_for(schema)
validator.check_schema(schema)


def shape(v):
    """What an item has, whatever its numbers are."""
    if isinstance(v, dict):
        return "{%s}" % ",".join("%s:%s" % (k, shape(x)) for k, x in sorted(v.items()))
    return v if isinstance(v, str) else type(v).__name__


def shortened(v):
    """The validator is slow: of a long list the ends, and one of each shape between them."""
    if isinstance(v, dict):
        return {k: shortened(x) for k, x in v.items()}
    if isinstance(v, list):
        if len(v) > 1000:
            shapes = {shape(x): x for x in v}
            v = v[:100] + list(shapes.values())[:1000] + v[-100:]
        return [shortened(x) for x in v]
    return v


failed = 0
for name in sys.argv[2:]:
    with open(name) as f:
        report = shortened(json.load(f))
    for e in validator(schema).iter_errors(report):
        failed = 1
        print("%s: %s: %s" % (name, "/".join(map(str, e.absolute_path)), e.message[:300]))
sys.exit(failed)
