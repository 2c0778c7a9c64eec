"""From files to `Batch`: plan first, decode later.

In the order that data take: `shards` (tar files, samples and what is wrong with them), `images` (what a stored image
is), `index` (where each sample is, and how long), `remote` (shards that stand elsewhere), `planning` (which span
stands in which row, from integers only), `loading` (rows, batches, workers). `viewing` shows what comes of it,
`prepare` makes shards of real data.
"""
