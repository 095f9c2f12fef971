"""Recovery: the shrunk model is trained a little toward the dense one, in the same shape (`slimexport recover`)."""
