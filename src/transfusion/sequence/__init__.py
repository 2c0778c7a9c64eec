"""What a document is to the network: its tokens, where its images stand, how large they may be, how noisy they are.

`tokenizer` turns text into tokens, `sizes` says which image sizes there are and which token begins each, `layout` lays
a document out as arrays, `timesteps` draws the noise level of each image.
"""
