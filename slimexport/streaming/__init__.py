"""Models that are larger than memory: what is in no block is loaded, blocks come from disk when their turn is.

files.py    tensors of safetensors files, read and written one at a time
model.py    a model of which only embedding, final norm and head are in memory
blocks.py   its blocks, one after the other: a `pruning.blocks.BlockSource`
"""
