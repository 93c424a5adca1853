"""Every JSON file that the project reads: schema, version, limits, one file a format; `reading` is the one parser."""
