"""How much a project or a key may use: limits that operators set, buckets for rates, and places for what lasts."""
