"""What zero_shot.py is made of: parts, arms, one run, the plan of a part, what is kept, statistics, tables."""
