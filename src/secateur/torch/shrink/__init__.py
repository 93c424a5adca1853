"""From a plan to a smaller model: removal of units, attributes that mirror sizes, and a probe that tries removal."""
