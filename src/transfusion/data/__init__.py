"""From files to `Batch`: plan first, decode later.

Reading order: shards (files), tokenizer, scan and index (what is where, and how long), deck and planner
(which piece stands in which row, from integers only), sequence (a document as arrays), decode (a picture),
rows (a planned row as arrays), packing (rows to a Batch), workers, loader (training), evaluation (held-out
data); prepare, collect and captions make shards of real data.
"""
