"""How do rows become a batch? Files are read into typed rows, rows into token shards, shards into packed batches.

Open first `rows.py` (what a row is), then `formats.py` (how a file is recognised) and `pack.py` (how rows fill
a batch).
Nothing is imported here, so that `groundup --help` stays quick.
"""
