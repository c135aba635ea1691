"""The `rloop` command: parse, validate, build the rooms, run. The only importer of rooms."""
