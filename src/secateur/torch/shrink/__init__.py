"""Plan to smaller model: real removal of units, the Python attributes that repeat sizes, and a probe of it."""
