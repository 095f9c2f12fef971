"""The machine that everything runs on: its cores, its speed, its memory, and what else it does meanwhile."""
