"""Tasks of lm-eval (extra `eval`), on whatever the runtime can open: exported graphs, GGUF files, torch checkpoints.

named.py     which task, and where its questions come from
harness.py   a decoder as lm-eval wants a model
score.py     what came out, question by question
"""
