"""From files to `Batch`: plan first, decode later.

Reading order: shards (files), tokenizer; tarwalk, probe, latents, judge and scan (what a shard holds, and what is wrong
with the rest); download and cache (shards that stand elsewhere); shardindex, indexing and index (where it is, and how
long); deck, stream and planner (which piece stands in which row, from integers only), sequence (a document as arrays),
decode (a picture), rows (a planned row as arrays), fetching (remote shards, before they are wanted), packing (rows to a
Batch), workers, loader (training), evaluation (held-out data); survey, drawing and views (what it looks like); prepare,
collect and captions make shards of real data.
"""
