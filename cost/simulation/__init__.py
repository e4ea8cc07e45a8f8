"""The execution simulator: streams over a program under a plan, and the timelines that come of it."""
