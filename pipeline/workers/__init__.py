"""Workers: one loop that hands out the tasks, and processes, threads or Ray actors that take them."""
