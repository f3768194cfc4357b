"""Before a job: what it would cost, which solver is good enough, how many samples fit in memory."""
