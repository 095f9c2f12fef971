"""Graph builders, in the order in which `auto` tries them: the fast one first, the general one as the fallback."""
