"""What ablations.py is made of: the variants of a recipe, their play, statistics, the table, the picture."""
