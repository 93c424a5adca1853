"""Every JSON file that the project reads: schema, version and limits, one file a format; `reading` is the one parser."""
