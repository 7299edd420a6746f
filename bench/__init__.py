"""Tools that run the daemons from outside, as a user would: the demo, and what tests share with it."""
