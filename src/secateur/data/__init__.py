"""A user's data as a table: read from files, its columns found by their names, its rows split; images and sounds."""
